"use strict";
// What the page does beside standing there: the heat map's choices, a tensor's panel, the memory bar, copying.
// Everything shown is text or an attribute's value; nothing from the data is ever parsed as markup.
const data = JSON.parse(document.getElementById("data").textContent);
const byId = (id) => document.getElementById(id);
const SVG = "http://www.w3.org/2000/svg";
const WIDTH = Math.max(300, Math.min(880, innerWidth - 54)); // of pictures drawn here: as wide as there is room
const NARROW = 600;

function make(tag, attributes = {}, ...children) {
  const made = document.createElement(tag);
  for (const [name, value] of Object.entries(attributes)) made.setAttribute(name, value);
  made.append(...children);
  return made;
}

function draw(tag, attributes = {}, said) {
  const made = document.createElementNS(SVG, tag);
  for (const [name, value] of Object.entries(attributes)) made.setAttribute(name, value);
  if (said !== undefined) made.textContent = said;
  return made;
}

const short = (value, digits = 4) => (value === null || value === undefined ? "?" : String(+value.toPrecision(digits)));
const share = (value) => (value === null || value === undefined ? "not a number" : short(100 * value, 3) + " %");

function size(bytes) {
  const units = ["B", "kB", "MB", "GB", "TB"];
  let at = 0;
  for (; bytes >= 1000 && at < 4; at++) bytes /= 1000;
  return bytes.toFixed(at ? 1 : 0) + " " + units[at];
}

// The heat map: a cell is [name, type, bits, error of the weight, error of its output], or null.
const MODES = [
  { at: 3, said: share },
  { at: 4, said: share },
  { at: 2, said: (v) => short(v) + " bits" },
  { at: 1, said: (v) => v },
];

function heatMap() {
  const map = byId("map");
  if (!map) return;
  const { at, files, columns } = data.heat;
  const rects = [...map.querySelectorAll("[data-cell]")];
  const mode = byId("mode"), file = byId("file"), picture = map.querySelector("svg");
  let chosen = 0;
  if (!files.some((cells) => cells.some((cell) => cell && cell[4] !== null))) mode.options[1].disabled = true;

  function paint() {
    const cells = files[file ? +file.value : 0], how = MODES[+mode.value];
    const values = cells.map((cell) => cell && cell[how.at]);
    const types = [...new Set(values.filter((v) => typeof v === "string"))];
    const numbers = values.filter((v) => typeof v === "number");
    const low = Math.min(...numbers), span = Math.max(...numbers) - low || 1;
    rects.forEach((rect, i) => {
      const cell = cells[i], value = values[i], type = types.indexOf(value);
      const broken = cell && value === null && how.at !== 4;
      const marks = [broken && "broken", type >= 0 && "t" + (type % 10), rect.classList.contains("chosen") && "chosen"];
      rect.setAttribute("class", ["cell", ...marks.filter(Boolean)].join(" "));
      const shade = !cell ? 0 : type >= 0 || broken ? 1 : value === null ? 0 : 0.1 + (0.9 * (value - low)) / span;
      rect.setAttribute("fill-opacity", shade);
      const title = rect.querySelector("title");
      title.textContent = cell ? `${cell[0]}: ${how.said(value)}, ${cell[1]}, ${short(cell[2])} bits` : "not there";
    });
    legend(types, numbers.length ? [low, low + span] : [], how);
  }

  function legend(types, ends, how) {
    const key = byId("key");
    key.replaceChildren();
    types.forEach((type, i) => key.append(make("span", { class: "swatch t" + (i % 10) }), type + "  "));
    if (ends.length && !types.length) key.append(`palest ${how.said(ends[0])}, darkest ${how.said(ends[1])}`);
  }

  function choose(index, open) {
    rects[chosen].classList.remove("chosen");
    chosen = index;
    rects[chosen].classList.add("chosen");
    const cell = files[file ? +file.value : 0][chosen];
    picture.setAttribute("aria-label", cell ? rects[chosen].querySelector("title").textContent : "not there");
    if (open && cell) panel(cell, file ? +file.value : 0);
  }

  function moved(key) {
    const [row, column] = at[chosen];
    const step = { ArrowLeft: [0, -1], ArrowRight: [0, 1], ArrowUp: [-1, 0], ArrowDown: [1, 0] }[key];
    if (!step) return -1;
    for (let r = row + step[0], c = column + step[1], n = 0; n < columns; r += step[0], c += step[1], n++) {
      const found = at.findIndex((place) => place[0] === r && place[1] === c);
      if (found >= 0) return found;
    }
    return -1;
  }

  picture.setAttribute("tabindex", "0");
  picture.addEventListener("click", (event) => {
    const rect = event.target.closest("[data-cell]");
    if (rect) choose(rects.indexOf(rect), true);
  });
  picture.addEventListener("keydown", (event) => {
    if (event.key === "Enter" || event.key === " ") choose(chosen, true);
    else if (moved(event.key) >= 0) choose(moved(event.key), false);
    else return;
    event.preventDefault();
  });
  mode.addEventListener("change", paint);
  if (file) file.addEventListener("change", () => { paint(); byId("tensor").replaceChildren(); });
  paint();
}

// One tensor: its weights on its grid, its scales, its worst blocks, one block's arithmetic.
function panel(cell, file) {
  const [name, type, bits, weight, output] = cell;
  const inside = file === 0 ? data.tensors[name] : undefined;
  const facts = [`${type}, ${short(bits)} bits a weight`, `error ${share(weight)}`];
  if (output !== null) facts.push(`of its output ${share(output)}`);
  if (inside) facts.push(inside.shape.join(" × "));
  const parts = [make("h3", {}, name), make("p", { class: "quiet" }, facts.join(" · "))];
  if (!inside && data.live) {
    const wait = make("p", { class: "quiet" }, "looking into it …");
    parts.push(wait);
    ask("panel", { tensor: name }).then(
      (found) => { data.tensors[name] = found; if (wait.isConnected) panel(cell, file); },
      (error) => { wait.textContent = error.message; });
  } else if (!inside) {
    const why = file === 0 ? "There is no more about this tensor on the page." : `Panels are of ${data.files[0]} only.`;
    parts.push(make("p", { class: "quiet" }, why));
  } else {
    parts.push(...histogram(inside.histogram), ...scales(inside.scales), ...block(inside));
  }
  byId("tensor").replaceChildren(...parts);
  byId("tensor").scrollIntoView({ block: "nearest" });
}

function bars(counts, css, top, height, stage) {
  const width = WIDTH / counts.length;
  counts.forEach((count, i) => {
    const tall = top ? (height * count) / top : 0;
    const place = { x: (i * width).toFixed(1), y: (height - tall + 4).toFixed(1), width: Math.max(width - 1, 0.5).toFixed(1) };
    stage.append(draw("rect", { ...place, height: tall.toFixed(1), class: css }));
  });
}

function picture(height, label) {
  return draw("svg", { viewBox: `0 0 ${WIDTH} ${height}`, role: "img", "aria-label": label, class: "drawn" });
}

function ends(stage, y, left, right, middle) {
  stage.append(draw("text", { x: 0, y, class: "tick" }, left));
  stage.append(draw("text", { x: WIDTH, y, class: "tick", "text-anchor": "end" }, right));
  if (!middle) return;
  const below = WIDTH < NARROW ? 16 : 0; // beside the ends there is no room on a narrow screen
  stage.append(draw("text", { x: WIDTH / 2, y: y + below, class: "tick", "text-anchor": "middle" }, middle));
  stage.setAttribute("viewBox", `0 0 ${WIDTH} ${y + 6 + below}`);
}

function histogram(found) {
  const stage = picture(170, "weights before and after");
  const wide = (counts) => counts.length && Math.max(...counts);
  bars(found.after, "bar after", wide(found.after), 140, stage);
  const top = wide(found.before), width = WIDTH / found.before.length;
  const line = found.before.map((count, i) => `${((i + 0.5) * width).toFixed(1)},${(144 - (140 * count) / top).toFixed(1)}`);
  stage.append(draw("polyline", { points: line.join(" "), class: "curve before" }));
  const unit = found.unit === "step" ? "in steps of each block’s own grid" : "by value";
  ends(stage, 164, short(found.low), short(found.high), `${unit}, ${found.weights.toLocaleString("en")} weights`);
  return [make("h4", {}, "Before (line) and after (bars)"), make("div", { class: "scroll" }, stage)];
}

function scales(found) {
  if (!found) return [];
  const stage = picture(84, "distribution of block scales");
  bars(found.counts, "bar pooled", Math.max(...found.counts), 54, stage);
  ends(stage, 78, short(found.low), short(found.high), "size of one step, block by block");
  return [make("h4", {}, "Scales"), make("div", { class: "scroll" }, stage)];
}

function block(inside) {
  const found = inside.block, parts = [];
  parts.push(make("h4", {}, `The worst block: row ${found.row}, columns from ${found.column}`));
  if (found.points.length) parts.push(make("div", { class: "scroll" }, numberLine(found)));
  parts.push(arithmetic(found));
  const other = inside.worst.slice(1).map((w) => `row ${w.row}, column ${w.column}: ${share(w.relative)}`);
  parts.push(make("p", { class: "quiet" }, `Error there ${share(inside.worst[0].relative)}; next worst: ${other.join("; ")}`));
  return parts;
}

function arithmetic(found) {
  const head = make("tr", {}, ...["column", "weight", "stored", "off by", found.made.length ? "how it is made" : ""].map((t, i) =>
    make("th", i < 4 ? { class: "n" } : {}, t)));
  const lines = found.before.map((w, i) => make("tr", {},
    make("td", { class: "n" }, String(found.column + i)),
    make("td", { class: "n" }, short(w, 5)),
    make("td", { class: "n" }, short(found.after[i], 5)),
    make("td", { class: "n" }, w === null || found.after[i] === null ? "?" : short(found.after[i] - w, 2)),
    make("td", { class: "mono" }, found.made[i] || "")));
  const table = make("table", {}, make("thead", {}, head), make("tbody", {}, ...lines));
  return make("details", {}, make("summary", {}, "its arithmetic, weight by weight"), make("div", { class: "scroll" }, table));
}

function numberLine(found) {
  const before = found.before.slice(0, found.alike), after = found.after.slice(0, found.alike);
  const all = [...before, ...found.points].filter((v) => v !== null);
  const low = Math.min(...all), span = Math.max(...all) - low || 1;
  const x = (v) => (10 + ((WIDTH - 20) * (v - low)) / span).toFixed(1);
  const stage = picture(96, "weights of the block above the values its grid has");
  for (const point of found.points) stage.append(draw("line", { x1: x(point), x2: x(point), y1: 56, y2: 70, class: "axis" }));
  before.forEach((w, i) => {
    if (w === null || after[i] === null) return;
    stage.append(draw("line", { x1: x(w), y1: 18, x2: x(after[i]), y2: 56, class: "move" }));
    stage.append(draw("circle", { cx: x(w), cy: 15, r: 3.5, class: "dot" }));
  });
  ends(stage, 90, short(low), short(low + span), found.told || "weights above, values of the grid below");
  return stage;
}

// Memory: a bar of parts at a context and a type of keys and values.
function memory() {
  if (!byId("memory") || !data.memory.length) return;
  const file = byId("memory-file"), type = byId("memory-type"), slider = byId("context");
  const first = data.memory[0];
  for (const name of Object.keys(first.bytes)) type.append(make("option", { value: name }, name));
  slider.max = first.contexts.length - 1;
  slider.value = first.start;
  if (file && data.picked) file.selectedIndex = [...file.options].findIndex((o) => o.text === data.picked);

  function paint() {
    const found = data.memory[file ? +file.value : 0], parts = found.bytes[type.value][+slider.value];
    const longest = Math.max(...data.memory.flatMap((m) => Object.values(m.bytes).map((t) => t.at(-1).reduce((a, b) => a + b))));
    const context = found.contexts[+slider.value].toLocaleString("en");
    byId("context-said").textContent = context;
    slider.setAttribute("aria-valuetext", context + " tokens");
    const whole = parts.reduce((a, b) => a + b), stage = picture(44, `${size(whole)} in all`);
    let x = 0;
    parts.forEach((bytes, i) => {
      const width = (WIDTH * bytes) / longest;
      const rect = draw("rect", { x: x.toFixed(1), y: 6, width: Math.max(width - 1, 0.5).toFixed(1), height: 30, class: "t" + i });
      rect.append(draw("title", {}, `${found.names[i]}: ${size(bytes)}`));
      stage.append(rect);
      x += width;
    });
    const list = make("p", { class: "key" });
    parts.forEach((bytes, i) => list.append(make("span", { class: "swatch t" + i }), `${found.names[i]} ${size(bytes)}  `));
    const said = make("p", {}, make("b", {}, size(whole)), ` in ${found.runtime} with ${context} tokens of context`);
    byId("stack").replaceChildren(said, stage, list);
  }
  for (const control of [file, type, slider]) if (control) control.addEventListener("input", paint);
  paint();
}

function copying() {
  for (const button of document.querySelectorAll(".copy")) {
    button.addEventListener("click", async () => {
      const code = button.previousElementSibling;
      try {
        await navigator.clipboard.writeText(code.textContent);
        button.textContent = "copied";
      } catch {
        getSelection().selectAllChildren(code);
        button.textContent = "selected";
      }
      setTimeout(() => { button.textContent = "copy"; }, 1500);
    });
  }
}

heatMap();
memory();
copying();
