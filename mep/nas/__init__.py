"""Architecture search: cells behind one signature, spaces of networks, libraries of trained blocks, predictors, search and fine-tuning."""
from .bkd import BlockLibrary, draw_library, nsr, teach_block, teacher_maps
from .cells import ACTIVATIONS, CELLS, Attention, Cell, OnTokens, Residual, Shift, cell, cell_options, diagram, make_cell
from .finetune import SearchCost, answers, assembled, distil, finetune, learn_accuracy, lighter_space, measured_front, trained_accuracies
from .predictor import AccuracyPredictor, Assembled, Score, kendall, kendall_gain
from .search import (
    Additive,
    Deployment,
    Front,
    Measured,
    crossing,
    draw_front,
    hypervolume,
    latency_table,
    load_scenarios,
    macs_cost,
    merge_blocks,
    pareto_front,
    save_scenarios,
    scaled_references,
    search,
)
from .space import ORIGINAL, Arch, Option, Parts, Position, SearchSpace, assemble, choices, chop, default_options, default_space, module_hash

__all__ = ["ACTIVATIONS", "AccuracyPredictor", "Additive", "Arch", "Assembled", "Attention", "BlockLibrary", "CELLS", "Cell", "Deployment", "Front", "Measured", "ORIGINAL", "OnTokens", "Option",
           "Parts", "Position", "Residual", "Score", "SearchCost", "SearchSpace", "Shift", "answers", "assemble", "assembled", "cell", "cell_options", "choices", "chop", "crossing",
           "default_options", "default_space", "diagram", "distil", "draw_front", "draw_library", "finetune", "hypervolume", "kendall", "kendall_gain", "latency_table", "learn_accuracy",
           "lighter_space", "load_scenarios", "macs_cost", "make_cell", "measured_front", "merge_blocks", "module_hash", "nsr", "pareto_front", "save_scenarios", "scaled_references", "search",
           "teach_block", "teacher_maps", "trained_accuracies"]
