# SPDX-License-Identifier: Apache-2.0
"""Finding lottery tickets and proving them: one module an idea, one registry a kind of choice."""

from __future__ import annotations

from sparselt.lottery.controls import CONTROLS
from sparselt.lottery.counting import count
from sparselt.lottery.criteria import CRITERIA
from sparselt.lottery.data import DATASETS, Data, load_data
from sparselt.lottery.dead_units import relu_activity, remove_idle
from sparselt.lottery.download import download_data
from sparselt.lottery.edge_popup import add_supermasks, find_supermask, read_supermasks
from sparselt.lottery.experiment import Experiment, run_experiment
from sparselt.lottery.filters import FILTER_CRITERIA
from sparselt.lottery.initialisation import prune_at_initialisation
from sparselt.lottery.networks import NETWORKS
from sparselt.lottery.recipe import Recipe
from sparselt.lottery.recipes import RECIPES, recipe_of
from sparselt.lottery.replicates import run_replicates
from sparselt.lottery.restarts import RESTARTS
from sparselt.lottery.schedules import SCHEDULES
from sparselt.lottery.scratch import scratch_control
from sparselt.lottery.search import Level, Progress, best_level, find_ticket, run_levels
from sparselt.lottery.stability import Stability, measure_stability
from sparselt.lottery.structured import prune_filters
from sparselt.lottery.structured_search import run_structured_levels
from sparselt.lottery.training import OPTIMISERS, Outcome, Step, Training, evaluate, train

__all__ = [
    "CONTROLS",
    "CRITERIA",
    "DATASETS",
    "FILTER_CRITERIA",
    "NETWORKS",
    "OPTIMISERS",
    "RECIPES",
    "RESTARTS",
    "SCHEDULES",
    "Data",
    "Experiment",
    "Level",
    "Outcome",
    "Progress",
    "Recipe",
    "Stability",
    "Step",
    "Training",
    "add_supermasks",
    "best_level",
    "count",
    "download_data",
    "evaluate",
    "find_supermask",
    "find_ticket",
    "load_data",
    "measure_stability",
    "prune_at_initialisation",
    "prune_filters",
    "read_supermasks",
    "recipe_of",
    "relu_activity",
    "remove_idle",
    "run_experiment",
    "run_levels",
    "run_replicates",
    "run_structured_levels",
    "scratch_control",
    "train",
]
