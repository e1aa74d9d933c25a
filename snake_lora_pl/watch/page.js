// The page shows the state that the server sends, and asks for each next position. It holds no state of the game.
"use strict";

const MOVES = ["UP", "RIGHT", "DOWN", "LEFT"];
const ENDS = {
  WALL: "it hit the wall", SELF: "it hit itself", WIN: "won, the board is full", STARVED: "too many steps without an apple",
  NO_VALID_ANSWER: "the completion names no valid move",
};
const byId = (id) => document.getElementById(id);
const canvas = byId("board");
let state = null;
let isPlaying = false;
let isBusy = false;
let queued = null; // the user's move while a request is in progress
let timer = null;

function element(name, className, text = "") {
  const made = document.createElement(name);
  made.className = className;
  made.textContent = text;
  return made;
}

const rows = Object.fromEntries(MOVES.map((move) => {
  const row = element("li", "");
  const track = element("span", "track");
  track.setAttribute("aria-hidden", "true");
  track.append(document.createElement("i"));
  row.append(element("span", "name", move), track, element("span", "value"), element("span", "tags"));
  byId("moves").append(row);
  return [move, row];
}));

function draw() {
  if (state) drawBoard(canvas, {size: state.size, end: state.end, frames: [state.frame]}, 0);
}

function percent(value) {
  return value > 0 && value < 0.001 ? "<0.1%" : `${(100 * value).toFixed(1)}%`;
}

function showMoves() {
  const {probabilities, frame} = state;
  byId("moves").classList.toggle("plain", !probabilities);
  for (const move of MOVES) {
    const row = rows[move];
    const isChosen = state.has_decision && frame.move === move;
    row.classList.toggle("chosen", isChosen);
    const value = probabilities ? probabilities[move] : 0;
    row.querySelector("i").style.width = `${100 * value}%`;
    row.querySelector(".value").textContent = probabilities ? percent(value) : "";
    const tags = row.querySelector(".tags");
    tags.replaceChildren();
    if (isChosen) tags.append(element("span", "tag player", "player"));
    if (state.teacher_move === move) tags.append(element("span", "tag teacher", "teacher"));
    if (state.has_decision && !state.legal.includes(move)) tags.append(element("span", "tag risk", "ends the game"));
    if (state.traps.includes(move)) tags.append(element("span", "tag risk", "trap"));
  }
  byId("note").textContent = note();
}

function note() {
  if (!state.has_decision) return "The game is over.";
  if (state.probabilities) {
    const sum = MOVES.reduce((total, move) => total + state.probabilities[move], 0);
    return `Probability of each move's name where the completion names the move. Other text: ${percent(Math.max(0, 1 - sum))}.`;
  }
  if (state.player.startsWith("teacher:")) return "A teacher computes its move from the board.";
  return "No probabilities: the completion has no conclusion.";
}

function fillSelect(select, names, chosen, group) {
  if (select.dataset.names !== names.join()) {
    select.dataset.names = names.join();
    const groups = new Map();
    for (const name of names) {
      const [label, title] = group(name);
      if (!groups.has(title)) groups.set(title, []);
      groups.get(title).push(new Option(label, name));
    }
    select.replaceChildren(...[...groups].flatMap(([title, options]) => {
      if (!title) return options;
      const made = document.createElement("optgroup");
      made.label = title;
      made.append(...options);
      return [made];
    }));
  }
  select.value = chosen;
}

function show(next) {
  const isNewGame = state === null || state.game !== next.game;
  state = next;
  byId("step").textContent = state.step.toLocaleString("en");
  byId("apples").textContent = state.apples;
  byId("agreement").textContent = state.judged ? `${(100 * state.agreed / state.judged).toFixed(0)}%` : "–";
  byId("seconds").textContent = state.seconds < 0.01 ? "<10 ms" : state.seconds < 1 ? `${Math.round(1000 * state.seconds)} ms` : `${state.seconds.toFixed(1)} s`;
  byId("prompt").textContent = state.prompt;
  byId("completion").textContent = state.completion || "(empty)";
  byId("texts").hidden = !state.prompt;
  fillSelect(byId("player"), state.players, state.player, (id) => {
    const [type, name] = id.split(/:(.*)/);
    return [name, type === "adapter" ? "Adapters" : "Teachers"];
  });
  fillSelect(byId("teacher"), state.teachers, state.teacher, (name) => [name, ""]);
  if (isNewGame) {
    byId("size").value = state.size;
    byId("seed").value = state.seed;
  }
  canvas.setAttribute("aria-label", `Board of ${state.size} by ${state.size}. Head at ${state.frame.head}, apple at ${state.frame.apple ?? "no cell"}, length ${state.length}.`);
  showMoves();
  if (state.end) setPlaying(false);
  showStatus();
  draw();
}

function showStatus() {
  const over = state.end !== null;
  for (const button of [byId("play"), byId("next"), ...document.querySelectorAll(".wheel button")]) button.disabled = over;
  // While the game plays, a screen reader would not keep up with every step.
  if (over) byId("status").textContent = `Game over after ${state.step} steps with ${state.apples} apples: ${ENDS[state.end] || state.end}.`;
  else if (isPlaying) byId("status").textContent = "playing";
  else byId("status").textContent = `paused, next move: ${state.frame.move || "none"}`;
}

function setPlaying(value) {
  isPlaying = value;
  byId("play").textContent = value ? "Pause" : "Play";
  clearTimeout(timer);
  if (value) tick();
}

function showError(text) {
  byId("error").textContent = text;
  byId("error").hidden = !text;
}

/** Send a request, and show the new state or the error. Only one request is in progress at a time. */
async function send(path, values, waiting) {
  if (isBusy) return;
  isBusy = true;
  const slow = setTimeout(() => { byId("status").textContent = waiting; }, 400);
  try {
    const options = values && {method: "POST", headers: {"Content-Type": "application/json"}, body: JSON.stringify(values)};
    const response = await fetch(path, options);
    const answer = await response.json();
    showError(response.ok ? "" : answer.error);
    if (response.ok) show(answer);
    else setPlaying(false);
  } catch (error) {
    if (!(error instanceof TypeError)) throw error;
    setPlaying(false);
    showError("The server does not answer. Is the command still running?");
  } finally {
    clearTimeout(slow);
    isBusy = false;
    if (state) showStatus();
  }
}

async function advance(move) {
  if (!state || state.end) return;
  if (isBusy) {
    queued = move ?? queued;
    return;
  }
  const values = {game: state.game, step: state.step};
  await send("api/move", move ? {...values, move} : values, "thinking…");
  if (queued) {
    const next = queued;
    queued = null;
    await advance(next);
  }
}

async function tick() {
  const start = performance.now();
  await advance();
  if (isPlaying) timer = setTimeout(tick, Math.max(0, 1000 / byId("speed").value - (performance.now() - start)));
}

function toggle() {
  if (!state || state.end) return;
  setPlaying(!isPlaying);
  showStatus();
}

function step() {
  setPlaying(false);
  return advance();
}

function steer(move) {
  setPlaying(false);
  return advance(move);
}

function changeSpeed(by) {
  const speed = byId("speed");
  speed.selectedIndex = Math.min(Math.max(speed.selectedIndex + by, 0), speed.options.length - 1);
}

async function startGame() {
  setPlaying(false);
  await send("api/game", {grid_size: byId("size").valueAsNumber, seed: byId("seed").valueAsNumber}, "starting…");
}

async function choose(values) {
  setPlaying(false);
  await send("api/players", values, "loading…");
  if (state) {
    byId("player").value = state.player;
    byId("teacher").value = state.teacher;
  }
}

byId("play").onclick = toggle;
byId("next").onclick = step;
byId("player").onchange = (event) => choose({player: event.target.value});
byId("teacher").onchange = (event) => choose({teacher: event.target.value});
byId("settings").onsubmit = (event) => {
  event.preventDefault();
  startGame();
};
for (const button of document.querySelectorAll("[data-move]")) button.onclick = () => steer(button.dataset.move);
document.addEventListener("keydown", (event) => {
  if (event.ctrlKey || event.metaKey || event.altKey || ["SELECT", "INPUT", "PRE"].includes(event.target.tagName)) return;
  // The browser presses the focused button on Space.
  if (event.key === " " && event.target.tagName === "BUTTON") return;
  const actions = {
    " ": toggle, ".": step, ArrowUp: () => steer("UP"), ArrowRight: () => steer("RIGHT"), ArrowDown: () => steer("DOWN"),
    ArrowLeft: () => steer("LEFT"), n: startGame, N: startGame, "+": () => changeSpeed(1), "=": () => changeSpeed(1), "-": () => changeSpeed(-1),
  };
  if (!(event.key in actions)) return;
  event.preventDefault();
  actions[event.key]();
});
// Another page may have moved.
document.addEventListener("visibilitychange", () => { if (!document.hidden && !isPlaying) send("api/state", null, ""); });
matchMedia("(prefers-color-scheme: dark)").addEventListener("change", draw);
new ResizeObserver(draw).observe(canvas);
send("api/state", null, "");
