# SPDX-License-Identifier: Apache-2.0
"""Makes ``python -m sparselt`` the same as the ``sparselt`` command."""

from __future__ import annotations

import sys

from sparselt.cli import main

if __name__ == "__main__":
    sys.exit(main())
