
// One number as every kind of number keeps it.
function numbers() {
  const text = byId("text"), largest = byId("largest"), place = byId("digits"), wrong = byId("number-trouble");

  function kind(row) {
    const digits = row.parts.map(([name, bits]) => make("span", { class: name, title: name }, bits));
    const off = row.off === null ? "" : row.off === 0 ? ", exact" : `, off by ${share(row.off)}`;
    const [made, power] = row.made.split("^");
    const value = row.value === null ? "not finite" : String(row.value);
    return make("div", { class: "kind" },
      make("div", {}, make("b", {}, row.name), make("br"), make("small", {}, `${short(row.bpw)} bits`)),
      make("div", {}, make("div", { class: "digits" }, ...digits),
        make("div", {}, value, make("small", {}, off + (made && `   = ${made}`), ...(power ? [make("sup", {}, power)] : []))),
        make("small", {}, row.note)));
  }

  function key() {
    const names = ["sign", "exponent", "mantissa", "code", "scale", "zero"];
    return make("p", { class: "digits" }, ...names.map((name) => make("span", { class: name }, name)));
  }

  function show(found) {
    trouble(wrong, "");
    place.replaceChildren(key(), ...found.rows.map(kind));
  }
  const asks = () => ask("number", { text: text.value, ...(largest.value === "" ? {} : { largest: +largest.value }) });
  const follow = following(asks, show, (said) => trouble(wrong, said));
  for (const control of [text, largest]) control.addEventListener("input", follow);
  follow();
}

numbers();
