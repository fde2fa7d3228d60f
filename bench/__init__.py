# SPDX-License-Identifier: Apache-2.0
"""Regression benchmarks of the kernels, for `make bench`."""
