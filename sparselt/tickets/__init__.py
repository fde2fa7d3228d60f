# SPDX-License-Identifier: Apache-2.0
"""Tickets: masks with their weights, the ticket file, and readers of other tools' files."""

from __future__ import annotations

from sparselt.tickets.loaders import LOADERS, Loader, load_ticket
from sparselt.tickets.state_dicts import ticket_from_state_dict
from sparselt.tickets.ticket import LayerSummary, Ticket

__all__ = ["LOADERS", "LayerSummary", "Loader", "Ticket", "load_ticket", "ticket_from_state_dict"]
