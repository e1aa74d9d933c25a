import io
import json
import subprocess
import sys
from html.parser import HTMLParser

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from rich.console import Console

from snake_lora_pl.game import Board, End, Game, Move, get_style, get_teacher
from snake_lora_pl.game.replay import Frame, Recording, record, render_gif, render_html, show

BOARD = Board(4, ((1, 1), (1, 2), (2, 2)), (3, 0))
MARKUP = "</script><script>alert(1)</script> & <b>'bold'</b> [red]__GAME__ __TITLE__ \u2028 Grüße"


def play(size: int = 5, seed: int = 1, title: str = "A game") -> Recording:
    teacher, style = get_teacher("bfs"), get_style("bfs-512")

    def choose(board: Board) -> tuple[Move, str]:
        move = teacher(board) or board.fallback_move()
        return move, style.write_completion(board, move)

    return record(Game(size, seed, max_steps_without_apple=50), choose, title)


class Page(HTMLParser):
    """Parsed HTML page: the elements with their attributes, and the texts by tag."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.elements: list[tuple[str, dict[str, str | None]]] = []
        self.texts: dict[str, list[str]] = {}
        self._open: list[str] = []
        self.feed(page)

    def handle_starttag(self, tag: str, attributes: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, dict(attributes)))
        self._open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        while self._open and self._open.pop() != tag:
            pass

    def handle_data(self, data: str) -> None:
        if self._open:
            self.texts.setdefault(self._open[-1], []).append(data)

    @property
    def ids(self) -> set[str]:
        return {attributes["id"] for _, attributes in self.elements if "id" in attributes}

    @property
    def game(self) -> dict:
        return json.loads(self.texts["script"][0])


def test_a_recording_contains_every_position():
    recording = play()
    game = Game(5, 1, max_steps_without_apple=50)
    for frame in recording.frames:
        assert frame.board == game.board
        if game.end is None and frame.move is not None:
            assert f"Conclusion: The move is: {frame.move.name}" in frame.completion
            game.play(frame.move)
    assert game.end is recording.end
    assert recording.num_apples(len(recording.frames) - 1) == game.num_apples


def test_the_last_frame_is_the_full_board_or_the_illegal_move():
    cycle = get_teacher("hamiltonian")
    won = record(Game(4, 0), lambda board: (cycle(board), ""))
    assert (won.end, won.ended_by_illegal_move) == (End.WIN, False)
    assert won.frames[-1].board.length == 16
    assert won.frames[-1].move is None
    lost = record(Game(4, 0), lambda board: (Move.UP, "up"))
    assert (lost.end, lost.ended_by_illegal_move) == (End.WALL, True)
    assert lost.frames[-1] == Frame(lost.frames[-1].board, Move.UP, "up")
    silent = record(Game(4, 0), lambda board: (None, "I do not know"))
    assert [frame.completion for frame in silent.frames] == ["I do not know"]


def test_the_page_contains_the_whole_game():
    recording = play()
    game = Page(render_html(recording)).game
    assert (game["size"], game["end"], game["title"]) == (5, recording.end.value, "A game")
    assert len(game["frames"]) == len(recording.frames)
    for entry, frame in zip(game["frames"], recording.frames, strict=True):
        apple = None if entry["apple"] is None else tuple(entry["apple"])
        assert Board.from_trail(5, tuple(entry["head"]), entry["trail"], apple) == frame.board
        assert entry["move"] == (None if frame.move is None else frame.move.name)
        assert entry["completion"] == frame.completion


@settings(max_examples=40)
@given(st.text())
def test_titles_and_completions_stay_text(text):
    page = Page(render_html(Recording((Frame(BOARD, Move.UP, text + MARKUP),), None, text + MARKUP)))
    assert page.game["frames"][0]["completion"] == text + MARKUP
    assert page.game["title"] == text + MARKUP
    assert sum(tag == "script" for tag, _ in page.elements) == 2
    assert "b" not in {tag for tag, _ in page.elements}


def test_the_title_is_shown_unchanged():
    page = Page(render_html(Recording((Frame(BOARD),), None, MARKUP)))
    title = "".join(page.texts["title"])
    assert title == "".join(page.texts["h1"]) == MARKUP


def test_the_page_is_self_contained():
    text = render_html(play())
    page = Page(text)
    assert not [attributes for _, attributes in page.elements if {"src", "href", "srcset"} & set(attributes)]
    assert not [word for word in ("http:", "https:", "@import", "url(", "fetch(", "innerHTML") if word in text]
    policy = next(a["content"] for tag, a in page.elements if a.get("http-equiv") == "Content-Security-Policy")
    assert policy.startswith("default-src 'none'")


def test_the_page_has_its_controls():
    text = render_html(play())
    page = Page(text)
    assert page.ids >= {
        "first",
        "back",
        "play",
        "forward",
        "last",
        "seek",
        "speed",
        "theme",
        "board",
        "completion",
        "move",
    }
    for key in ('" "', "ArrowLeft", "ArrowRight", "Home", "End", '"+"', '"-"'):
        assert f"{key}:" in text
    assert "prefers-color-scheme: dark" in text
    assert ':root[data-theme="dark"]' in text
    # Every element that the script refers to exists.
    script = page.texts["script"][1]
    named = {part.partition('"')[0] for part in script.split('byId("')[1:]}
    assert named <= page.ids


def test_the_gif_shows_every_position_and_holds_the_last():
    recording = play()
    image = Image.open(io.BytesIO(render_gif(recording, cell_px=12, frames_per_second=10)))
    assert image.size == (5 * 12, 5 * 12 + 16)
    durations, frames = [], []
    for index in range(image.n_frames):
        image.seek(index)
        durations.append(image.info["duration"])
        frames.append(image.convert("RGB").copy())
    # Pillow merges identical frames.
    assert sum(durations) == 100 * (len(recording.frames) - 1) + 2_000
    assert image.info["loop"] == 0
    reds = [index for index, frame in enumerate(frames) if has_color(frame, (248, 83, 83))]
    assert reds == list(range(len(frames)))


def has_color(frame: Image.Image, color: tuple[int, int, int]) -> bool:
    return color in {found for _, found in frame.getcolors(maxcolors=10_000)}


def test_the_gif_shows_head_body_and_apple_at_their_cells():
    frame = Image.open(io.BytesIO(render_gif(Recording((Frame(BOARD),)), cell_px=20))).convert("RGB")

    def color_at(x: int, y: int) -> tuple[int, ...]:
        # Below the center, to avoid the eyes.
        return frame.getpixel((x * 20 + 10, (3 - y) * 20 + 14))

    assert color_at(*BOARD.head) == (74, 222, 128)
    assert color_at(*BOARD.apple) == (248, 83, 83)
    assert color_at(1, 2) == color_at(2, 2) == (34, 160, 93)
    assert color_at(0, 0) not in {color_at(*BOARD.head), color_at(*BOARD.apple), color_at(1, 2)}


def test_a_long_game_is_reduced_to_max_frames():
    cycle = get_teacher("hamiltonian")
    recording = record(Game(6, 0), lambda board: (cycle(board), ""))
    assert len(recording.frames) > 200
    image = Image.open(io.BytesIO(render_gif(recording, cell_px=6, max_frames=20)))
    assert 10 < image.n_frames <= 20


def test_the_terminal_plays_frame_by_frame(monkeypatch):
    delays = []
    monkeypatch.setattr("time.sleep", delays.append)
    recording = play()
    out = io.StringIO()
    console = Console(file=out, force_terminal=True, width=160, height=40)
    show(recording, console, frames_per_second=20)
    assert delays == [1 / 20] * (len(recording.frames) - 1)
    assert f"step 0 of {len(delays)}" in out.getvalue()
    assert recording.end.value in out.getvalue()


def test_output_that_is_not_a_terminal_gets_only_the_last_position():
    out = io.StringIO()
    show(
        Recording((Frame(BOARD), Frame(BOARD, Move.UP, MARKUP)), End.SELF, "[bold]title"), Console(file=out, width=200)
    )
    text = out.getvalue()
    assert text.count("step") == 1
    assert "step 1 of 1, apples 2, UP, SELF" in text
    assert "[bold]title" in text
    assert "</script><script>alert(1)</script> & <b>'bold'</b> [red]" in text


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"cell_px": 3}, "cell_px.*4.*3"),
        ({"frames_per_second": 0}, "frames_per_second.*50.*0"),
        ({"frames_per_second": 51}, "frames_per_second.*50.*51"),
        ({"max_frames": 1}, "max_frames.*2.*1"),
    ],
)
def test_gif_options_out_of_range_are_rejected(options, message):
    with pytest.raises(ValueError, match=message):
        render_gif(play(), **options)


def test_a_replay_speed_must_be_positive():
    with pytest.raises(ValueError, match="frames_per_second.*0"):
        show(play(), frames_per_second=0)


def test_a_recording_requires_positions_of_one_size():
    with pytest.raises(ValueError, match="position"):
        Recording(())
    with pytest.raises(ValueError, match=r"4, 5"):
        Recording((Frame(BOARD), Frame(Board(5, ((1, 1),), (0, 0)))))


def test_pillow_and_rich_are_imported_on_first_use():
    code = "import sys, snake_lora_pl.game.replay; print(*[m for m in ('PIL', 'rich', 'torch') if m in sys.modules])"
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert result.stdout.strip() == ""
