// Draws a position of a recorded game on a canvas. Included in every page that shows games. The page defines the colors as
// custom properties in #rrggbb: --tile-a, --tile-b, --snake, --snake-tail, --head, --apple, --leaf, --lost, --arrow, --eye.
const STEPS = {U: [0, 1], R: [1, 0], D: [0, -1], L: [-1, 0]};
const ILLEGAL_MOVE_ENDS = ["WALL", "SELF", "NO_VALID_ANSWER"];

function bodyOf(frame) {
  const body = [frame.head];
  for (const letter of frame.trail) {
    const [x, y] = body[body.length - 1];
    body.push([x + STEPS[letter][0], y + STEPS[letter][1]]);
  }
  return body;
}

function drawBoard(canvas, game, index) {
  const frame = game.frames[index];
  const pen = canvas.getContext("2d");
  const side = canvas.clientWidth;
  const scale = window.devicePixelRatio || 1;
  canvas.width = canvas.height = Math.round(side * scale);
  pen.setTransform(scale, 0, 0, scale, 0, 0);
  const styles = getComputedStyle(canvas);
  const color = (name) => styles.getPropertyValue(name).trim();
  const cell = side / game.size;
  const middle = ([x, y]) => [(x + 0.5) * cell, (game.size - y - 0.5) * cell];
  const isLost = index === game.frames.length - 1 && ILLEGAL_MOVE_ENDS.includes(game.end);

  for (let x = 0; x < game.size; x++) {
    for (let y = 0; y < game.size; y++) {
      pen.fillStyle = color((x + y) % 2 ? "--tile-a" : "--tile-b");
      pen.fillRect(x * cell, (game.size - 1 - y) * cell, cell + 0.5, cell + 0.5);
    }
  }
  if (frame.apple) {
    const [x, y] = middle(frame.apple);
    pen.fillStyle = color("--apple");
    pen.beginPath();
    pen.arc(x, y + cell * 0.04, cell * 0.31, 0, 2 * Math.PI);
    pen.fill();
    pen.fillStyle = color("--leaf");
    pen.beginPath();
    pen.ellipse(x + cell * 0.1, y - cell * 0.32, cell * 0.13, cell * 0.06, -0.6, 0, 2 * Math.PI);
    pen.fill();
  }

  const body = bodyOf(frame).map(middle);
  pen.lineCap = pen.lineJoin = "round";
  for (let i = body.length - 1; i > 0; i--) {
    // Thinner and paler toward the tail, so that the direction of the body is visible.
    const share = i / Math.max(body.length - 1, 1);
    pen.strokeStyle = isLost ? color("--lost") : mix(color("--snake"), color("--snake-tail"), share);
    pen.lineWidth = cell * (0.74 - 0.24 * share);
    pen.beginPath();
    pen.moveTo(...body[i]);
    pen.lineTo(...body[i - 1]);
    pen.stroke();
  }
  const [headX, headY] = body[0];
  pen.fillStyle = isLost ? color("--lost") : color("--head");
  pen.beginPath();
  pen.arc(headX, headY, cell * 0.41, 0, 2 * Math.PI);
  pen.fill();
  const [dx, dy] = frame.move ? STEPS[frame.move[0]] : [0, 1];
  pen.fillStyle = color("--eye");
  for (const turn of [-1, 1]) {
    pen.beginPath();
    pen.arc(headX + cell * (0.15 * dx + 0.17 * turn * dy), headY - cell * (0.15 * dy - 0.17 * turn * dx), cell * 0.075, 0, 2 * Math.PI);
    pen.fill();
  }
  if (frame.move) {
    const tipX = headX + dx * cell * 0.78, tipY = headY - dy * cell * 0.78;
    pen.fillStyle = color("--arrow");
    pen.beginPath();
    pen.moveTo(tipX, tipY);
    pen.lineTo(tipX - cell * (0.24 * dx + 0.15 * dy), tipY + cell * (0.24 * dy - 0.15 * dx));
    pen.lineTo(tipX - cell * (0.24 * dx - 0.15 * dy), tipY + cell * (0.24 * dy + 0.15 * dx));
    pen.fill();
  }
}

function mix(from, to, share) {
  const parts = (hex) => [1, 3, 5].map((i) => parseInt(hex.slice(i, i + 2), 16));
  const end = parts(to);
  return `rgb(${parts(from).map((value, i) => Math.round(value + (end[i] - value) * share)).join(",")})`;
}
