// The viewer of sampled lists. Everything shown is set as text, never as HTML.
(() => {
  "use strict";
  const at = id => document.getElementById(id);
  const MEASURES = ["reward", "advantage", "ratio", "logp"];
  const LABELS = { reward: "reward", advantage: "advantage", ratio: "ratio", logp: "log-prob" };
  const UP = "0, 158, 115", DOWN = "213, 94, 0", LIKELY = "0, 114, 178";
  let groups = [], shown = [], now = 0, inView = false;
  const largest = {};

  const make = (tag, css, text) => {
    const node = document.createElement(tag);
    if (css) node.className = css;
    if (text !== undefined) node.textContent = text;
    return node;
  };
  const sum = values => values.reduce((total, value) => total + (value ?? 0), 0);
  const words = (value, by) => value === null || value === undefined ? "none" : by === "advantage" && value > 0 ? "+" + value.toFixed(2) : value.toFixed(by === "ratio" ? 3 : 2);
  // How strongly a line is coloured, with the sign of its colour; 0 for what changes nothing.
  const strength = (value, by) => value === null ? 0 : by === "ratio" ? Math.log(Math.max(value, 1e-9)) : by === "logp" ? Math.exp(value) : value;

  async function unpack() {
    const packed = atob(at("v-data").textContent);
    const bytes = new Uint8Array(packed.length);
    for (let i = 0; i < packed.length; i++) bytes[i] = packed.charCodeAt(i);
    const stream = new Blob([bytes]).stream().pipeThrough(new DecompressionStream("gzip"));
    return JSON.parse(await new Response(stream).text());
  }

  function prepare(rows) {
    for (const by of MEASURES) largest[by] = 1e-9;
    groups = rows;
    for (const group of groups) {
      group.rewards = group.lists.map(list => sum(list.reward));
      group.best = Math.max(...group.rewards);
      group.hits = sum(group.lists.map(list => list.marks.filter(mark => mark.split(" ").includes("hit")).length));
      group.moves = group.lists.some(list => list.advantage.some(value => value) || list.end);
      const truth = group.groundtruth.map(itemText).join("\n");
      const talk = group.conversation.map(turn => turn.content).join("\n");
      group.text = [group.id, talk, truth, ...group.lists.flatMap(list => list.lines)].join("\n").toLowerCase();
      for (const list of group.lists)
        for (const by of MEASURES)
          for (const value of list[by]) largest[by] = Math.max(largest[by], Math.abs(strength(value, by)));
    }
    const steps = [...new Set(groups.map(group => group.step))];
    const step = at("v-step");
    step.append(new Option("all", "all"), ...steps.map(number => new Option(number, number)));
  }

  const itemText = ([title, year]) => year === null ? title : `${title} (${year})`;

  const KINDS = {
    all: () => true,
    hit: group => group.hits > 0,
    none: group => group.hits === 0,
    differ: group => group.moves,
    flat: group => !group.moves,
  };

  function filter(keep) {
    const step = at("v-step").value, least = parseFloat(at("v-least").value), text = at("v-search").value.trim().toLowerCase();
    const kind = KINDS[at("v-kind").value], old = shown[now];
    shown = groups.filter(group =>
      (step === "all" || group.step === Number(step)) && kind(group) && !(group.best < least) && group.text.includes(text));
    now = keep && shown.includes(old) ? shown.indexOf(old) : 0;
    const options = shown.map((group, place) => {
      const mean = sum(group.rewards) / group.rewards.length;
      return new Option(`step ${group.step}: ${group.id} (${group.hits} hit${group.hits === 1 ? "" : "s"}, mean reward ${mean.toFixed(2)})`, place);
    });
    at("v-group").replaceChildren(...options);
    draw();
  }

  function move(by) {
    if (shown.length) now = Math.min(Math.max(now + by, 0), shown.length - 1);
    draw();
  }

  function moveStep(by) {
    if (!shown.length) return;
    const steps = [...new Set(shown.map(group => group.step))];
    const place = Math.min(Math.max(steps.indexOf(shown[now].step) + by, 0), steps.length - 1);
    now = shown.findIndex(group => group.step === steps[place]);
    draw();
  }

  function draw() {
    const group = shown[now];
    at("v-count").textContent = group ? `${now + 1} of ${shown.length} groups` : `no group fits (of ${groups.length})`;
    at("v-back").disabled = !group || now === 0;
    at("v-next").disabled = !group || now === shown.length - 1;
    at("v-group").value = String(now);
    at("v-talk").replaceChildren(...(group ? talk(group) : []));
    at("v-lists").replaceChildren(...(group ? [table(group)] : []));
    at("v-lists").scrollTop = 0;
    scale();
  }

  function talk(group) {
    const turns = make("div", "talk");
    for (const turn of group.conversation) {
      const one = make("div", turn.role === "assistant" ? "turn assistant" : "turn");
      one.append(make("small", "", turn.role === "assistant" ? "Recommender" : "User"), turn.content);
      turns.append(one);
    }
    const truth = make("p", "soft");
    truth.append(make("b", "", "Ground truth: "), group.groundtruth.map(itemText).join(", "));
    return [turns, truth];
  }

  function table(group) {
    const places = group.lists.map((_, place) => place);
    if (at("v-order").value === "best") places.sort((a, b) => group.rewards[b] - group.rewards[a] || a - b);
    const drawn = make("table"), head = make("tr");
    head.append(make("th", "", ""));
    for (const place of places) {
      const list = group.lists[place], cell = make("th");
      const end = (list.finished ? "" : ", cut") + (list.end === undefined ? "" : `, end ${words(list.end, "advantage")}`);
      cell.append(make("b", "", `List ${place + 1}`), `reward ${group.rewards[place].toFixed(2)}, ${list.lines.length} lines, ${list.num_tokens} tokens${end}`);
      head.append(cell);
    }
    drawn.append(make("thead"));
    drawn.tHead.append(head);
    const body = drawn.createTBody(), most = Math.max(0, ...group.lists.map(list => list.lines.length));
    for (let rank = 0; rank < most; rank++) {
      const row = make("tr");
      row.append(make("td", "", rank + 1));
      for (const place of places) row.append(line(group.lists[place], rank));
      body.append(row);
    }
    return drawn;
  }

  function line(list, rank) {
    if (rank >= list.lines.length) return make("td");
    const by = at("v-by").value, value = list[by][rank];
    const marks = list.marks[rank].split(" ").filter(mark => mark);
    const cell = make("td", marks.join(" "));
    cell.append(make("span", "n", words(value, by)));
    for (const mark of marks) cell.append(make("span", `v-mark v-${mark}`, mark));
    cell.append(list.lines[rank]);
    cell.title = MEASURES.map(name => `${LABELS[name]} ${words(list[name][rank], name)}`).join(", ");
    const part = strength(value, by) / largest[by];
    cell.style.backgroundColor = `rgba(${colour(part, by)}, ${(0.62 * Math.min(Math.abs(part), 1)).toFixed(3)})`;
    return cell;
  }

  const colour = (part, by) => by === "logp" ? LIKELY : part < 0 ? DOWN : UP;

  function scale() {
    const by = at("v-by").value, most = largest[by], bar = make("i");
    const signed = by === "advantage" || by === "ratio" || groups.some(group => group.lists.some(list => list.reward.some(value => value < 0)));
    const low = signed ? `rgba(${DOWN}, .62), ` : "";
    bar.style.background = `linear-gradient(90deg, ${low}transparent, rgba(${by === "logp" ? LIKELY : UP}, .62))`;
    const ends = by === "ratio" ? [Math.exp(-most), Math.exp(most)] : by === "logp" ? [0, most] : [signed ? -most : 0, most];
    const name = by === "logp" ? "Colour: probability of a token, geometric mean over the line" : `Colour: ${LABELS[by]}`;
    const flat = by === "ratio" && most < 1e-4 ? " Every ratio is 1: the batch had one update." : "";
    at("v-scale").replaceChildren(name, " ", ends[0].toFixed(2), bar, ends[1].toFixed(2), flat);
  }

  function press(event) {
    const field = ["INPUT", "SELECT", "TEXTAREA"].includes(event.target.tagName);
    if (field && event.key === "Escape") return event.target.blur();
    if (field || !inView || event.ctrlKey || event.metaKey || event.altKey) return;
    const by = at("v-by"), order = at("v-order");
    const actions = {
      ArrowLeft: () => move(-1), k: () => move(-1), ArrowRight: () => move(1), j: () => move(1),
      p: () => moveStep(-1), n: () => moveStep(1), "/": () => at("v-search").focus(),
      c: () => { by.selectedIndex = (by.selectedIndex + 1) % by.length; draw(); },
      b: () => { order.selectedIndex = 1 - order.selectedIndex; draw(); },
    };
    if (!actions[event.key]) return;
    event.preventDefault();
    actions[event.key]();
  }

  async function start() {
    if (typeof DecompressionStream === "undefined") {
      at("v-lists").textContent = "This browser cannot unpack the lists (it lacks DecompressionStream); `rankgrpo show` prints them.";
      return;
    }
    prepare(await unpack());
    for (const id of ["v-step", "v-kind"]) at(id).addEventListener("change", () => filter(true));
    for (const id of ["v-least", "v-search"]) at(id).addEventListener("input", () => filter(true));
    for (const id of ["v-by", "v-order"]) at(id).addEventListener("change", draw);
    at("v-group").addEventListener("change", event => { now = Number(event.target.value); draw(); });
    at("v-back").addEventListener("click", () => move(-1));
    at("v-next").addEventListener("click", () => move(1));
    new IntersectionObserver(entries => { inView = entries.at(-1).isIntersecting; }).observe(at("viewer"));
    document.addEventListener("keydown", press);
    filter(false);
    at("viewer").dataset.ready = "yes";
  }

  // After the first paint.
  requestAnimationFrame(() => setTimeout(start, 0));
})();
