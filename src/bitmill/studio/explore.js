
// The studio: asks the program that sent the page. What it shows was computed there, by the code that quantizes.
async function ask(what, fields) {
  let answer, found;
  try {
    answer = await fetch("ask/" + what, {
      method: "POST", headers: { "content-type": "application/json" }, body: JSON.stringify(fields) });
    found = await answer.json();
  } catch {
    throw new Error("The studio does not answer: has it been ended in the terminal?");
  }
  if (!answer.ok) throw new Error([found.error.what, found.error.fix].filter(Boolean).join(" – "));
  return found;
}

// Calls `asks` whenever something has changed, one question at a time; `shows` gets the latest answer.
function following(asks, shows, troubles) {
  let busy = false, again = false;
  return async function follow() {
    if (busy) { again = true; return; }
    busy = true;
    do {
      again = false;
      try { shows(await asks()); } catch (error) { troubles(error.message); }
    } while (again);
    busy = false;
  };
}

function trouble(place, said) {
  place.hidden = !said;
  place.textContent = said || "";
}

function options(select, values, names = values) {
  select.replaceChildren(...values.map((value, i) => make("option", { value }, names[i])));
}

function explorer() {
  if (!byId("explore")) return;
  const at = {};
  for (const id of ["block", "weight", "row", "column", "shown", "rows", "grid", "named", "name", "bits", "group",
    "zero", "outlier", "at", "turn", "verdict", "line", "codes", "beside", "inside"]) at[id] = byId(id);
  const INTEGERS = "integers", NAMED = "by name";
  options(at.block, data.blocks);
  at.grid.append(make("option", { value: INTEGERS }, "integers, by the sliders"));
  for (const [family, grids] of data.grids) {
    at.grid.append(make("optgroup", { label: family }, ...grids.map((grid) => make("option", { value: grid }, grid))));
  }
  at.grid.append(make("option", { value: NAMED }, "any other, by its name"));

  const groupName = () => ({ 0: "channel", "-1": "tensor" })[data.groups[+at.group.value]] || "g" + data.groups[+at.group.value];
  function gridText() {
    if (at.grid.value === INTEGERS) return `int${at.bits.value}-${groupName()}-${at.zero.value}`;
    return at.grid.value === NAMED ? at.name.value.trim().toLowerCase() : at.grid.value;
  }
  const fields = () => ({
    tensor: at.weight.value, row: +at.row.value, column: +at.column.value, rows: +at.rows.value, shown: +at.shown.value,
    grid: gridText(), outlier: +at.outlier.value, at: +at.at.value, turn: at.turn.checked });

  function labels() {
    const free = at.grid.value === INTEGERS;
    at.named.hidden = at.grid.value !== NAMED;
    for (const control of [at.bits, at.group, at.zero]) control.disabled = !free;
    byId("bits-said").textContent = free ? at.bits.value : "the grid’s";
    byId("group-said").textContent = !free ? "the grid’s" : groupName().replace(/^g/, "");
    byId("outlier-said").textContent = +at.outlier.value ? `${at.outlier.value} × rms` : "none";
    at.outlier.setAttribute("aria-valuetext", byId("outlier-said").textContent);
    at.group.setAttribute("aria-valuetext", byId("group-said").textContent);
  }

  function card(label, value, under) {
    return make("div", { class: "card" }, make("span", { class: "name" }, label), make("b", {}, value), make("span", {}, under));
  }

  function show(found) {
    trouble(byId("trouble"), "");
    const { lost } = found, many = (found.rows[1] - found.rows[0] + 1) * found.whole[1];
    const cards = [
      card("Bits a weight", found.bits === null ? "?" : short(found.bits, 5), `${found.grid}, of ${found.whole.join(" × ")}`),
      card("Error", share(lost.relative), `rmse ${short(lost.rmse, 3)} of ${many.toLocaleString("en")} weights`),
      card("Worst", short(lost.worst, 3), `row ${lost.place[0]}, column ${lost.place[1]}`)];
    if (lost.others !== null) cards.push(card("Error of the others", share(lost.others), "without the outlier"));
    at.verdict.replaceChildren(...cards);
    at.line.replaceChildren(...line(found));
    at.codes.replaceChildren(...codes(found));
    at.beside.replaceChildren(...Object.entries(found.beside).map(([what, values]) => curve(what, values, lost.others !== null)));
    at.inside.replaceChildren(
      arithmetic(found.block),
      make("details", {}, make("summary", {}, "all of these rows: distribution and scales"),
        ...histogram(found.histogram), ...scales(found.scales)));
  }

  // Keeps the details open that are open, while the rest is drawn anew.
  function showKeeping(found) {
    const open = [...at.inside.querySelectorAll("details")].map((one) => one.open);
    show(found);
    [...at.inside.querySelectorAll("details")].forEach((one, i) => { one.open = open[i] || false; });
  }

  function line(found) {
    const { block } = found, parts = [], occurring = block.occurring;
    const points = occurring ? [...new Set(block.after.filter((v) => v !== null))].sort((a, b) => a - b) : block.points;
    const alike = occurring ? block.before.length : block.alike;
    const told = occurring ? "weights above, the values that occur below" : "";
    const stage = numberLine({ ...block, points, alike, told });
    const kept = new Set(block.after.slice(0, alike));
    [...stage.querySelectorAll("line.axis")].forEach((tick, i) => { if (kept.has(points[i])) tick.setAttribute("class", "axis used"); });
    const dots = [...stage.querySelectorAll("circle")], put = +at.at.value - block.column;
    if (is_put(found) && dots[put]) drag(stage, dots[put], block, points, found);
    const spread = alike < block.before.length
      ? `columns ${block.column} to ${block.column + alike - 1}: the others have a scale of their own`
      : `columns ${block.column} to ${block.column + block.before.length - 1}`;
    const turned = found.order ? `, behind a rotation of order ${found.order}` : "";
    const kept_as = found.kept && `The file has them ${found.kept === "quantized" ? "" : `on ${found.kept}, `}quantized already`;
    const values = occurring ? `${points.length} values occur` : `${points.length} values, ${[...kept].length} of them in use`;
    parts.push(make("h4", {}, `Row ${found.row}, ${spread}${turned}`), stage, make("p", { class: "quiet" }, [values, found.remark.replace(/\.$/, ""), kept_as].filter(Boolean).join(". ") + "."));
    return parts;
  }

  const is_put = (found) => found.lost.others !== null && !found.order && found.row === +at.row.value;

  // The outlier can be moved along the line; the slider and its keys do the same.
  function drag(stage, dot, block, points, found) {
    dot.setAttribute("class", "dot put");
    dot.setAttribute("r", 6);
    const all = [...block.before.slice(0, block.alike || block.before.length), ...points].filter((v) => v !== null);
    const low = Math.min(...all), span = Math.max(...all) - low || 1;
    const value = (event) => {
      const place = stage.getBoundingClientRect();
      const x = ((event.clientX - place.left) / place.width) * WIDTH;
      return low + ((x - 10) / (WIDTH - 20)) * span;
    };
    dot.addEventListener("pointerdown", (down) => {
      const move = (event) => {
        at.outlier.value = Math.round(Math.abs(value(event)) / found.rms);
        changed();
      };
      const stop = () => { removeEventListener("pointermove", move); removeEventListener("pointerup", stop); };
      addEventListener("pointermove", move);
      addEventListener("pointerup", stop);
      down.preventDefault();
    });
  }

  function codes(found) {
    const { block } = found;
    if (!block.codes.length) return [];
    const put = found.lost.others !== null && !found.order ? +at.at.value - block.column : -1;
    const cells = block.codes.map((code, i) => make("li", i === put ? { class: "put" } : {}, String(code), make("small", {}, short(block.after[i], 2))));
    return [make("h4", {}, "Codes, and below them what they stand for"), make("ul", { class: "codes" }, ...cells)];
  }

  function curve(what, values, others) {
    const NAMES = { bits: "Error by bits", group: "Error by group", zero: "Error by zero point" };
    const wide = 260, high = 84, stage = draw("svg", { viewBox: `0 0 ${wide} ${high + 34}`, role: "img", "aria-label": NAMES[what] });
    const top = Math.max(...values.map((v) => v.error || 0)) || 1, step = wide / values.length;
    const now = what === "group" ? String(data.groups[+at.group.value]) : at[what].value;
    values.forEach(({ value, error }, i) => {
      const tall = (high * (error || 0)) / top, x = i * step, name = { 0: "row", "-1": "all" }[what === "group" ? value : ""] || value;
      const css = at.grid.value === INTEGERS && value === now ? "bar now" : "pooled";
      stage.append(draw("rect", { x: x + 2, y: 16 + high - tall, width: step - 4, height: Math.max(tall, 1), rx: 2, class: css }));
      stage.append(draw("text", { x: x + step / 2, y: high + 30, class: "tick", "text-anchor": "middle" }, name));
      stage.append(draw("text", { x: x + step / 2, y: 12 + high - tall, class: "tick", "text-anchor": "middle" },
        error === null ? "?" : short(100 * error, 2)));
    });
    return make("div", {}, make("h4", {}, `${NAMES[what]}, %${others ? " of the others" : ""}`), stage);
  }

  const follow = following(() => ask("line", fields()), showKeeping, (said) => trouble(byId("trouble"), said));
  function changed() {
    labels();
    if (at.weight.value) follow();
  }

  async function names() {
    try {
      const found = await ask("tensors", { block: at.block.value });
      const short_name = (name) => name.replace(/^.*?\.(?:layers|h|blocks)\.\d+\./, "").replace(/\.weight$/, "");
      const before = short_name(at.weight.value);
      options(at.weight, found.matrices.map((m) => m.name), found.matrices.map((m) => `${short_name(m.name)} ${m.shape.join(" × ")}`));
      const same = found.matrices.find((m) => short_name(m.name) === before);
      if (same) at.weight.value = same.name;
      changed();
    } catch (error) {
      trouble(byId("trouble"), error.message);
    }
  }

  at.block.addEventListener("input", names);
  for (const id of ["weight", "row", "column", "shown", "rows", "grid", "bits", "group", "zero", "outlier", "at", "turn"]) {
    at[id].addEventListener("input", changed);
  }
  at.name.addEventListener("change", changed);
  at.column.addEventListener("change", () => { at.at.value = at.column.value; changed(); });
  comparing(fields, (grid) => {
    const there = [...at.grid.options].some((option) => option.value === grid);
    at.grid.value = there ? grid : NAMED;
    at.name.value = grid;
    changed();
    byId("explore").scrollIntoView({ block: "nearest" });
  });
  labels();
  names();
}

// Every grid on the rows that are looked at: a picture of bits against error, and a table.
function comparing(fields, choose) {
  byId("compare").addEventListener("click", async (event) => {
    const place = byId("compared"), button = event.currentTarget;
    button.disabled = true;
    place.replaceChildren(make("p", { class: "quiet" }, "rounding …"));
    try {
      const found = await ask("compare", fields());
      place.replaceChildren(scatter(found.rows), table(found), left(found.left));
    } catch (error) {
      place.replaceChildren(make("p", { class: "note" }, error.message));
    }
    button.disabled = false;
  });

  function scatter(all) {
    const rows = all.filter((row) => row.relative > 0 && row.bits <= 17);
    const stage = picture(330, "error against bits a weight");
    if (!rows.length) return stage;
    const log = (row) => Math.log10(row.relative), low = Math.floor(Math.min(...rows.map(log))), high = Math.ceil(Math.max(...rows.map(log)));
    const x = (bits) => 50 + ((WIDTH - 66) * Math.log2(bits / 1)) / Math.log2(17);
    const y = (value) => 14 + (280 * (high - value)) / Math.max(high - low, 1);
    for (let power = low; power <= high; power++) {
      stage.append(draw("line", { x1: 50, x2: WIDTH - 10, y1: y(power), y2: y(power), class: "grid" }));
      stage.append(draw("text", { x: 44, y: y(power) + 4, class: "tick", "text-anchor": "end" }, share(10 ** power)));
    }
    for (const bits of [1, 2, 3, 4, 6, 8, 16]) {
      stage.append(draw("text", { x: x(bits), y: 312, class: "tick", "text-anchor": "middle" }, bits === 16 && WIDTH > NARROW ? "16 bits" : String(bits)));
    }
    const front = rows.filter((row) => row.front), taken = [];
    stage.append(draw("polyline", { points: front.map((row) => `${x(row.bits).toFixed(1)},${y(log(row)).toFixed(1)}`).join(" "), class: "front" }));
    for (const row of [...rows.filter((one) => !one.front), ...front]) {
      const spot = draw("g", { class: row.front ? "spot" : "spot beaten" }), place = [x(row.bits), y(log(row))];
      spot.append(draw("circle", { cx: place[0].toFixed(1), cy: place[1].toFixed(1), r: row.front ? 5 : 3.5 }));
      spot.append(draw("title", {}, `${row.grid}: ${short(row.bits)} bits, error ${share(row.relative)}`));
      const clear = taken.every(([a, b]) => Math.abs(a - place[0]) > 74 || Math.abs(b - place[1]) > 13);
      if (row.front && clear && row.grid.length < 18 && place[0] < WIDTH - 110) {
        taken.push(place);
        spot.append(draw("text", { x: (place[0] + 8).toFixed(1), y: (place[1] - 5).toFixed(1), class: "label" }, row.grid));
      }
      stage.append(spot);
    }
    return stage;
  }

  function table(found) {
    const head = make("tr", {}, ...["grid", "bits", "error", "rmse"].map((t, i) => make("th", i ? { class: "n" } : {}, t)));
    const lines = found.rows.map((row) => {
      const name = make("button", { type: "button", class: "plain" }, row.grid);
      name.addEventListener("click", () => choose(row.grid));
      return make("tr", { class: row.front ? "knee" : "beaten" }, make("td", {}, name),
        ...[short(row.bits), share(row.relative), short(row.rmse, 3)].map((t) => make("td", { class: "n" }, t)));
    });
    const count = found.rows.filter((row) => row.front).length;
    return make("details", {}, make("summary", {}, `all ${found.rows.length} on ${found.weights.toLocaleString("en")} weights; on the line are ${count}`),
      make("div", { class: "scroll" }, make("table", {}, make("thead", {}, head), make("tbody", {}, ...lines))));
  }

  function left(grids) {
    const said = grids.map((one) => `${one.grid}: ${one.why}`).join("; ");
    return make("p", { class: "quiet" }, said && `Not here: ${said}`);
  }
}

explorer();
