// The page: its controls, the socket, and what each message changes. docs/live.md specifies the messages.

import { Grid } from "./grid.js";
import { Player } from "./player.js";
import { exampleIcon, Film, promptColor } from "./film.js";

const $ = (id) => document.getElementById(id);
const FRAME = 1, THUMBNAIL = 2, HEADER = 12;
const NAMES = { timestep_first: "timestep-first", block_first: "block-first" };
const EXPLANATIONS = {
  timestep_first: "Timestep-first: each tile reads the blocks on its left at its own noise level, so the work sweeps along the diagonal.",
  block_first: "Block-first: a block passes all its steps before the next one starts, and each tile reads finished blocks.",
};
const ENDS = { stopped: "Stopped.", timeout: "Time is up: others wait. Press start to queue again.", idle: "Ended after a long pause: others wait.",
  finished: "The video is finished.", "server stopped": "The server stopped.", restarted: "" };

const state = { model: null, phase: "connecting", paused: false, started: null, image: "", prompts: [], blocks: new Map(), sent: null,
  frames: 0, passes: [], wait: 500 };
let socket = null;

const grid = new Grid($("grid"));
const film = new Film($("film"));
const player = new Player($("screen"), $("light"), onShow);

// ---- Socket ----

function connect() {
  const url = new URL("ws", location.href);
  url.protocol = location.protocol === "https:" ? "wss:" : "ws:";
  const token = new URLSearchParams(location.search).get("token") ?? sessionStorage.getItem("token") ?? "";
  if (token) {
    sessionStorage.setItem("token", token);
    url.searchParams.set("token", token);
    history.replaceState(null, "", location.pathname);
  }
  socket = new WebSocket(url);
  socket.binaryType = "arraybuffer";
  socket.onmessage = ({ data }) => (typeof data === "string" ? onMessage(JSON.parse(data)) : onPicture(data));
  socket.onclose = (event) => {
    setPhase("offline");
    hint(event.code === 1006 && !state.model ? "No connection. Is the token right?" : "The connection is lost; trying again.", true);
    setTimeout(connect, state.wait);
    state.wait = Math.min(8000, state.wait * 1.7);
  };
}

function send(message) {
  if (socket?.readyState === WebSocket.OPEN) socket.send(JSON.stringify(message));
}

const handlers = {
  hello(message) {
    state.model = message;
    state.wait = 500;
    $("model").textContent = `${message.name} · ${message.width}×${message.height} · ${message.device}`;
    player.fps = message.fps;
    player.blockFrames = message.block_frames;
    player.setSize(message.width, message.height);
    grid.setModel(message.sigmas, message.block_frames, message.fps, message.width / message.height, message.context);
    film.aspect = message.width / message.height;
    showChoices("schedules", "schedule", message.schedules, message.schedule, NAMES);
    showChoices("rules", "rule", message.rules, message.rule, {});
    showExamples(message.examples);
    document.querySelector(".image").hidden = !message.features.includes("image");
    $("rules").hidden = !message.features.includes("prompt");
    if (!$("prompt").value) $("prompt").value = message.examples[0] ?? "";
    setPhase("idle");
    hint("");
    cover("");
    explain();
  },
  queue({ position, waiting }) {
    setPhase("queued", waiting === 1 && position === 1 ? "waiting" : `queue: ${position} of ${waiting}`);
    cover(position === 1 ? "You are next" : `${position - 1} before you`);
  },
  started(message) {
    Object.assign(state, { started: message, paused: false, prompts: [], sent: null, frames: 0, passes: [] });
    state.blocks.clear();
    player.reset();
    player.paused = false;
    film.reset();
    grid.reset(message.schedule);
    $("lag").textContent = "–";
    $("frames").textContent = "0";
    enableDownload(false);
    setPhase("running");
    hint("");
    cover("");
    explain();
  },
  op(message) {
    grid.op(message, performance.now());
    state.passes.push(message.seconds);
    if (state.passes.length > 40) state.passes.shift();
  },
  block(message) {
    const known = state.prompts.includes(message.prompt);
    if (!known) state.prompts.push(message.prompt);
    const color = promptColor(state.prompts.indexOf(message.prompt)), last = state.blocks.get(message.block - 1);
    const block = { prompt: message.prompt, frames: message.new_frames, isSwitch: last?.prompt !== message.prompt, color };
    state.blocks.set(message.block, block);
    state.blocks.delete(message.block - 300);
    state.frames = message.frames;
    film.add(message.block, block);
    grid.finished(message.block, color, message.prompt, block.isSwitch, performance.now());
    $("frames").textContent = message.frames.toLocaleString("en");
    if (message.dropped) $("frames").title = `${message.dropped} frames were dropped: the connection is slow`;
    enableDownload(true);
  },
  error({ message }) { hint(message, true); },
  ended({ reason, message }) {
    setPhase("idle");
    cover("");
    hint(message ?? ENDS[reason] ?? reason, reason === "error");
  },
};

function onMessage(message) { handlers[message.type]?.(message); }

function onPicture(data) {
  const view = new DataView(data), jpeg = data.slice(HEADER);
  const kind = view.getUint8(0), index = view.getUint16(2, true), block = view.getUint32(4, true), number = view.getUint32(8, true);
  const decode = () => createImageBitmap(new Blob([jpeg], { type: "image/jpeg" }));
  if (kind === FRAME) {
    player.add(jpeg, block, number, index);
    if (index === Math.floor((state.blocks.get(block)?.frames ?? 0) / 2)) decode().then((bitmap) => {
      film.picture(block, bitmap);
      grid.frame(block, bitmap);
    }, () => {});
  } else if (kind === THUMBNAIL) {
    const schedule = grid.columns;
    decode().then((bitmap) => (schedule === grid.columns ? grid.thumbnail(block, index, bitmap) : bitmap.close()), () => {});
  }
}

/** Called for each frame on the screen. */
function onShow(frame) {
  const block = state.blocks.get(frame.block);
  grid.playing = { block: frame.block, share: (frame.index + 1) / (block?.frames ?? 12) };
  film.mark(frame.block);
  if (state.sent && block?.prompt === state.sent.prompt) {
    $("lag").replaceChildren(((performance.now() - state.sent.time) / 1000).toFixed(1), unit("s"));
    state.sent = null;
    hint("");
  }
}

// ---- Controls ----

function setPhase(phase, text) {
  state.phase = phase;
  const running = phase === "running", shown = running && state.paused ? "paused" : phase;
  document.body.dataset.state = shown;
  $("status").textContent = text ?? { idle: "ready", queued: "queued", offline: "no connection" }[shown] ?? shown;
  $("go").disabled = phase === "offline" || phase === "connecting" || (running && !state.model.features.includes("prompt"));
  $("go").textContent = running ? "Send" : "Start";
  $("pause").disabled = !running;
  $("pause").textContent = state.paused ? "Resume" : "Pause";
  $("stop").disabled = !(running || phase === "queued");
  $("seed").disabled = phase === "offline" || phase === "connecting";
}

function start(seed) {
  const prompt = $("prompt").value.trim();
  if (!prompt) return hint("Describe a video first.", true);
  const message = { type: "start", prompt, schedule: chosen("schedule"), prompt_switch: chosen("rule") };
  if (seed !== undefined) message.seed = seed;
  if (state.image) message.image = state.image;
  send(message);
}

function submit() {
  if (state.phase !== "running") return start();
  const prompt = $("prompt").value.trim().replace(/\s+/g, " ");
  if (!prompt) return hint("Describe a video first.", true);
  send({ type: "prompt", prompt });
  state.sent = { prompt, time: performance.now() };
  hint("The next block that starts follows this prompt.");
}

function togglePause() {
  if (state.phase !== "running") return submit();
  state.paused = !state.paused;
  player.paused = state.paused;
  send({ type: state.paused ? "pause" : "resume" });
  setPhase("running");
}

function hint(text, bad = false) {
  $("hint").textContent = text;
  $("hint").classList.toggle("bad", bad);
}

function cover(text) { $("cover").textContent = text; }
function unit(text) { return Object.assign(document.createElement("small"), { textContent: text }); }
function chosen(name) { return document.querySelector(`input[name=${name}]:checked`)?.value; }

function explain() {
  const schedule = state.phase === "running" ? state.started.schedule : chosen("schedule");
  $("explanation").textContent = EXPLANATIONS[schedule] ?? "";
}

function showChoices(id, name, values, value, names) {
  const legend = $(id).firstElementChild;
  $(id).replaceChildren(legend, ...values.map((choice) => {
    const label = document.createElement("label"), input = document.createElement("input"), text = document.createElement("span");
    label.className = "choice";
    Object.assign(input, { type: "radio", name, value: choice, checked: choice === value });
    text.textContent = names[choice] ?? choice;
    label.append(input, text);
    return label;
  }));
}

function showExamples(examples) {
  $("examples").replaceChildren(...examples.map((text) => {
    const item = document.createElement("li"), button = document.createElement("button"), span = document.createElement("span");
    button.type = "button";
    span.textContent = text;
    button.append(exampleIcon(text), span);
    button.onclick = () => { $("prompt").value = text; submit(); };
    item.append(button);
    return item;
  }));
}

function enableDownload(enabled) {
  const link = $("download");
  link.setAttribute("aria-disabled", String(!enabled));
  if (enabled) Object.assign(link, { href: state.started.download, download: "hiar-live.mp4" });
  else link.removeAttribute("href");
}

async function chooseImage(file) {
  state.image = "";
  $("preview").hidden = $("clear-image").hidden = true;
  if (!file) return;
  try {
    const bitmap = await createImageBitmap(file), { width, height } = state.model;
    const canvas = document.createElement("canvas"), scale = Math.max(width / bitmap.width, height / bitmap.height);
    Object.assign(canvas, { width, height });
    const place = [(width - bitmap.width * scale) / 2, (height - bitmap.height * scale) / 2, bitmap.width * scale, bitmap.height * scale];
    canvas.getContext("2d").drawImage(bitmap, ...place);
    state.image = canvas.toDataURL("image/png").split(",")[1];
    $("preview").getContext("2d").drawImage(canvas, 0, 0, 48, 48);
    $("preview").hidden = $("clear-image").hidden = false;
    hint(state.phase === "running" ? "Press new seed to start from this image." : "The video will start from this image.");
  } catch {
    hint("This file is no picture that the browser can read.", true);
  }
}

function setView(view) {
  document.body.dataset.view = view;
  for (const tab of document.querySelectorAll("[role=tab]")) {
    tab.setAttribute("aria-selected", String(tab.dataset.view === view));
    tab.tabIndex = tab.dataset.view === view ? 0 : -1;
  }
  if (view === "method") $("side").prepend($("screen-figure"));
  else $("stage").prepend($("screen-figure"));
  history.replaceState(null, "", view === "method" ? "#method" : location.pathname);
  grid.resize();
}

function setTheme(theme) {
  document.documentElement.dataset.theme = grid.theme = theme;
}

/** Save the grid as a PNG file, with a line of text below it. */
async function savePicture() {
  const { canvas, ratio } = grid, copy = document.createElement("canvas"), c = copy.getContext("2d");
  copy.width = canvas.width;
  copy.height = canvas.height + 44 * ratio;
  c.fillStyle = getComputedStyle($("grid-figure")).backgroundColor;
  c.fillRect(0, 0, copy.width, copy.height);
  c.drawImage(canvas, 0, 0);
  c.fillStyle = getComputedStyle(document.body).color;
  c.font = `600 ${15 * ratio}px ui-sans-serif, system-ui, sans-serif`;
  c.fillText(`HiAR · ${NAMES[state.started?.schedule ?? chosen("schedule")]}`, 18 * ratio, canvas.height + 27 * ratio);
  const blob = await new Promise((resolve) => copy.toBlob(resolve, "image/png"));
  const link = Object.assign(document.createElement("a"), { href: URL.createObjectURL(blob), download: "hiar-schedule.png" });
  link.click();
  setTimeout(() => URL.revokeObjectURL(link.href), 10000);
}

const keys = { " ": togglePause, 1: () => setView("video"), 2: () => setView("method"), n: () => start(), s: () => send({ type: "stop" }),
  d: () => $("download").click(), t: () => $("theme").click(), g: savePicture, "/": () => $("prompt").select() };

addEventListener("keydown", (event) => {
  const typing = event.target.closest("textarea, input, summary, button, a");
  if (event.target.id === "prompt" && event.key === "Enter" && !event.shiftKey) { event.preventDefault(); return submit(); }
  if (event.target.id === "prompt" && event.key === "Escape") return event.target.blur();
  if (event.target.role === "tab" && event.key.startsWith("Arrow")) {
    setView(document.body.dataset.view === "video" ? "method" : "video");
    return $(`tab-${document.body.dataset.view}`).focus();
  }
  if ((typing && (event.key === " " || event.target.matches("textarea, input[type=text]"))) || event.ctrlKey || event.metaKey || event.altKey) return;
  if (keys[event.key]) { event.preventDefault(); keys[event.key](); }
});

$("form").onsubmit = (event) => { event.preventDefault(); submit(); };
$("play").onclick = () => start();
$("pause").onclick = togglePause;
$("stop").onclick = () => send({ type: "stop" });
$("seed").onclick = () => start();
$("picture").onclick = savePicture;
$("schedules").onchange = () => (state.phase === "running" ? start(state.started.seed) : explain());
$("rules").onchange = () => state.phase === "running" && hint("New seed starts a video with this rule.");
$("image").onchange = (event) => chooseImage(event.target.files[0]);
$("clear-image").onclick = () => { $("image").value = ""; chooseImage(null); };
for (const tab of document.querySelectorAll("[role=tab]")) tab.onclick = () => setView(tab.dataset.view);

const dark = matchMedia("(prefers-color-scheme: dark)");
dark.onchange = () => { if (!localStorage.getItem("theme")) setTheme(dark.matches ? "dark" : "light"); };
$("theme").onclick = () => {
  setTheme(document.documentElement.dataset.theme === "dark" ? "light" : "dark");
  localStorage.setItem("theme", document.documentElement.dataset.theme);
};
setTheme(localStorage.getItem("theme") ?? (dark.matches ? "dark" : "light"));

document.addEventListener("visibilitychange", () => send({ type: document.hidden ? "hide" : "show" }));

let refreshed = 0, drawn = 0;
function refresh(now) {
  player.tick(now);
  if (document.body.dataset.view === "method" && now - drawn > 24) { // 30 to 40 pictures per second are enough
    drawn = now;
    grid.draw(now);
  }
  if (now - refreshed > 400) {
    refreshed = now;
    const fps = player.rate(now), passes = state.passes;
    $("fps").textContent = fps ? fps.toFixed(1) : "–";
    const mean = passes.reduce((sum, seconds) => sum + seconds, 0) / passes.length;
    if (passes.length) $("pass").replaceChildren((1000 * mean).toFixed(0), unit("ms"));
  }
  requestAnimationFrame(refresh);
}

if (location.hash === "#method") setView("method");
connect();
requestAnimationFrame(refresh);
