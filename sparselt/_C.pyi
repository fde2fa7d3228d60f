# SPDX-License-Identifier: Apache-2.0
from typing import TypedDict

class KernelEntry(TypedDict):
    name: str
    op: str
    format: str
    device: str
    features: tuple[str, ...]
    tile_rows: int
    tile_columns: int
    dtype: str
    usable: bool
    reason: str

def kernels() -> list[KernelEntry]: ...
def cpu_features() -> list[str]: ...
def isa() -> str: ...
def build_info() -> dict[str, str]: ...
def multiply_add_rate() -> float: ...
def read_rate(bytes: int) -> float: ...
