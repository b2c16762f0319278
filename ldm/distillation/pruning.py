"""Which blocks of a U-Net a smaller one is cut out of, and what of both is compared (BK-SDM, Kim et al., 2023).

A level keeps its first residual blocks on the way down; on the way up the first ones and the last, which takes the
skip from the level above it. Whole levels may be left out at the deep end, and the middle block. With one of two blocks
a level that is the paper's BK-SDM-Base, segmind's sd_small; without the fourth level and the middle it is BK-SDM-Tiny,
sd_tiny.
"""

from __future__ import annotations

import re
from collections.abc import Iterator

from ldm.errors import UserError
from ldm.modules.diffusionmodules.unet_layout import UNET, UNetLayout
from ldm.weight_files import StateDict

BLOCK = re.compile(re.escape(UNET) + r"((?:input|output)_blocks\.\d+|middle_block)\.(.*)")


def block_sources(student: UNetLayout, teacher: UNetLayout) -> dict[str, str]:
    """The student's numbered blocks, and the teacher's that each is cut out of.

    Raises:
        UserError: the student has blocks that the teacher does not have.
    """
    check_smaller(student, teacher)
    kept = range(student.num_res_blocks)
    sources = {"input_blocks.0": "input_blocks.0"}
    for level in range(student.levels):
        for i in kept:
            sources[student.input_block(level, i)] = teacher.input_block(level, i)
            sources[student.output_block(level, i)] = teacher.output_block(level, i)
        last_here, last_there = student.num_res_blocks, teacher.num_res_blocks
        sources[student.output_block(level, last_here)] = teacher.output_block(level, last_there)
        if level < student.levels - 1:
            sources[student.input_block(level, last_here)] = teacher.input_block(level, last_there)
    if student.use_middle_block:
        sources["middle_block"] = "middle_block"
    return sources


def check_smaller(student: UNetLayout, teacher: UNetLayout) -> None:
    """Raise UserError when the student has levels or blocks that the teacher does not have."""
    if (
        student.channel_mult != teacher.channel_mult[: student.levels]
        or student.num_res_blocks > teacher.num_res_blocks
        or student.use_middle_block > teacher.use_middle_block
    ):
        raise UserError(
            f"unet_config: a student of {_words(student)} cannot be cut out of a teacher of {_words(teacher)}: "
            "it may have fewer of the deepest levels, fewer blocks a level, and no middle block"
        )


def _words(layout: UNetLayout) -> str:
    return ", ".join(f"{key} {value}" for key, value in layout.params().items())


def cut(state: StateDict, student: UNetLayout, teacher: UNetLayout) -> StateDict:
    """A whole model's weights with the student's U-Net in place of the teacher's; all else stays."""
    places = {there: here for here, there in block_sources(student, teacher).items()}
    out: StateDict = {}
    for key, value in state.items():
        found = BLOCK.fullmatch(key)
        if found is None:
            out[key] = value
        elif found[1] in places:
            out[f"{UNET}{places[found[1]]}.{found[2]}"] = value
    return out


def feature_pairs(student: UNetLayout, teacher: UNetLayout) -> list[tuple[str, str]]:
    """The blocks after which features are compared: (the student's, the teacher's), the last ones of each stage.

    Stages are the levels on the way down, the middle, and the levels on the way up. Levels are compared with the same
    levels. The student's last stage before the way up stands for all that the teacher does until its own way up has
    come to the student's deepest level, and is compared with the teacher's stage before that.
    """
    return list(_pairs(student, teacher))


def _pairs(student: UNetLayout, teacher: UNetLayout) -> Iterator[tuple[str, str]]:
    for level in range(student.levels - 1):
        yield _end_of_down(student, level), _end_of_down(teacher, level)
    deepest = student.levels - 1
    bottom = _end_of_down(student, deepest)
    if student.use_middle_block:
        if deepest == teacher.levels - 1:  # elsewhere the teacher goes on to another resolution
            yield bottom, _end_of_down(teacher, deepest)
        bottom = "middle_block"
    if len(set(teacher.channel_mult[deepest : deepest + 2])) == 1:  # elsewhere what comes up is of another width
        yield bottom, _before_up(teacher, deepest)
    for level in reversed(range(student.levels)):
        yield _end_of_up(student, level), _end_of_up(teacher, level)


def _end_of_down(layout: UNetLayout, level: int) -> str:
    downsamples = level < layout.levels - 1
    return layout.input_block(level, layout.num_res_blocks if downsamples else layout.num_res_blocks - 1)


def _end_of_up(layout: UNetLayout, level: int) -> str:
    return layout.output_block(level, layout.num_res_blocks)


def _before_up(layout: UNetLayout, level: int) -> str:
    """The last block before the way up comes to a level."""
    if level < layout.levels - 1:
        return _end_of_up(layout, level + 1)
    return "middle_block" if layout.use_middle_block else _end_of_down(layout, level)
