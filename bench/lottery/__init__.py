# SPDX-License-Identifier: Apache-2.0
"""Experiments on real data whose records are committed under bench/results/lottery."""
