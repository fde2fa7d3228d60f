# SPDX-License-Identifier: Apache-2.0
"""What to run where there is a GPU: run.sh is the way in."""
