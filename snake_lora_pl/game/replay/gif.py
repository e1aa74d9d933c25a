"""Replay of a recorded game as an animated GIF."""

from __future__ import annotations

import io
from typing import TYPE_CHECKING

from snake_lora_pl.game.board import Board, Cell, Move
from snake_lora_pl.game.replay.recording import Recording

if TYPE_CHECKING:
    from PIL.Image import Image
    from PIL.ImageDraw import ImageDraw

# Indices into the palette.
_BACKGROUND, _TILE, _BODY, _HEAD, _APPLE, _TEXT, _LOST = range(7)
_PALETTE = [(17, 24, 39), (24, 33, 50), (34, 160, 93), (74, 222, 128), (248, 83, 83), (226, 232, 240), (148, 163, 184)]

_LAST_FRAME_MS = 2_000
_MIN_FRAME_MS = 20  # Browsers show shorter frames for 100 ms.


def render_gif(
    recording: Recording, *, cell_px: int = 20, frames_per_second: float = 10.0, max_frames: int = 600
) -> bytes:
    """Render a game as an animated GIF that shows its last frame for two seconds and loops.

    Args:
        recording: The game.
        cell_px: Pixels along one side of a cell.
        frames_per_second: Playback speed, at most 50.
        max_frames: Maximum number of frames; of longer games, only every second, third, ... position is drawn.

    Returns:
        The file's bytes.

    Raises:
        ValueError: If a value is out of range.
    """
    if cell_px < 4:
        raise ValueError(f"cell_px must be at least 4 (found: {cell_px})")
    if not 0 < frames_per_second <= 1_000 / _MIN_FRAME_MS:
        raise ValueError(f"frames_per_second must be greater than 0 and at most 50 (found: {frames_per_second})")
    if max_frames < 2:
        raise ValueError(f"max_frames must be at least 2 (found: {max_frames})")
    last = len(recording.frames) - 1
    every = -(-last // (max_frames - 1)) or 1
    indices = [*range(0, last, every), last]
    images = [_draw(recording, index, cell_px) for index in indices]
    durations = [round(1_000 / frames_per_second)] * (len(images) - 1) + [_LAST_FRAME_MS]
    file = io.BytesIO()
    images[0].save(
        file, "GIF", save_all=True, append_images=images[1:], duration=durations, loop=0, optimize=False, disposal=1
    )
    return file.getvalue()


def draw_board(
    board: Board, caption: str, *, cell_px: int = 20, move: Move | None = None, is_lost: bool = False
) -> Image:
    """Draw a board with a line of text below it.

    Args:
        board: The position.
        caption: The text.
        cell_px: Pixels along one side of a cell.
        move: Direction that the head looks in; None for up.
        is_lost: Whether the head is drawn in gray, for a game that ended by an illegal move.

    Returns:
        The image, with a palette.
    """
    from PIL import Image, ImageDraw, ImageFont

    side = board.size * cell_px
    caption_px = max(16, cell_px)
    image = Image.new("P", (side, side + caption_px), _BACKGROUND)
    image.putpalette([value for color in _PALETTE for value in color])
    draw = ImageDraw.Draw(image)
    # No antialiasing: the palette has no intermediate colors.
    draw.fontmode = "1"
    for x in range(board.size):
        for y in range(board.size):
            if (x + y) % 2:
                draw.rectangle(_box((x, y), board.size, cell_px, 0), fill=_TILE)
    _draw_snake(draw, board, move, cell_px, is_lost=is_lost)
    if board.apple is not None:
        draw.ellipse(_box(board.apple, board.size, cell_px, cell_px // 6), fill=_APPLE)
    draw.text((4, side + 2), caption, fill=_TEXT, font=ImageFont.load_default(caption_px * 0.7))
    return image


def _draw(recording: Recording, index: int, cell_px: int) -> Image:
    frame = recording.frames[index]
    is_last = index == len(recording.frames) - 1
    caption = [f"{recording.num_apples(index)} apples", f"step {index}"]
    if is_last and recording.end is not None:
        caption.append(recording.end.value)
    is_lost = is_last and recording.ended_by_illegal_move
    return draw_board(frame.board, "  ".join(caption), cell_px=cell_px, move=frame.move, is_lost=is_lost)


def _draw_snake(draw: ImageDraw, board: Board, move: Move | None, cell_px: int, *, is_lost: bool) -> None:
    margin = max(1, cell_px // 8)
    boxes = [_box(cell, board.size, cell_px, margin) for cell in board.body]
    # From tail to head, each cell joined to the previous one, so that the order of the body is visible.
    for box, previous in zip(boxes[::-1], [boxes[-1], *boxes[:0:-1]], strict=True):
        draw.rectangle(_enclosing(box, previous), fill=_BODY)
    head = boxes[0]
    draw.rectangle(head, fill=_LOST if is_lost else _HEAD)
    left, top, right, bottom = head
    middle_x, middle_y = (left + right) / 2, (top + bottom) / 2
    eye_px = max(1, cell_px // 10)
    direction = move or Move.UP
    for side in (-1, 1):
        x = middle_x + cell_px * (direction.dx * 0.18 + side * direction.dy * 0.18)
        y = middle_y - cell_px * (direction.dy * 0.18 - side * direction.dx * 0.18)
        draw.ellipse((x - eye_px, y - eye_px, x + eye_px, y + eye_px), fill=_BACKGROUND)


def _box(cell: Cell, size: int, cell_px: int, margin: int) -> tuple[int, int, int, int]:
    """Return left, top, right and bottom of a cell in the image, whose y axis points down."""
    x, y = cell[0] * cell_px, (size - 1 - cell[1]) * cell_px
    return x + margin, y + margin, x + cell_px - 1 - margin, y + cell_px - 1 - margin


def _enclosing(box: tuple[int, ...], other: tuple[int, ...]) -> tuple[int, int, int, int]:
    return min(box[0], other[0]), min(box[1], other[1]), max(box[2], other[2]), max(box[3], other[3])
