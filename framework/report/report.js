"use strict";
// The report's own script: filters the list, and shows a run's page when it is asked for. A page's
// values are those of `_page` in html.py. All text goes into the document as text, never as HTML.

const byId = (id) => document.getElementById(id);
const colour = (name) =>
  getComputedStyle(document.documentElement).getPropertyValue(`--${name}`).trim();

function make(tag, attributes = {}, ...children) {
  const element = document.createElement(tag);
  for (const [name, value] of Object.entries(attributes)) {
    if (name === "class") element.className = value;
    else if (name.startsWith("on")) element.addEventListener(name.slice(2), value);
    else element.setAttribute(name, value);
  }
  element.append(...children.filter((child) => child !== null && child !== ""));
  return element;
}

const seconds = (at) => `${at.toFixed(3)} s`;

function bytes(count) {
  const units = ["B", "KiB", "MiB", "GiB"];
  let unit = 0;
  while (count >= 1024 && unit < units.length - 1) {
    count /= 1024;
    unit += 1;
  }
  return `${unit ? count.toFixed(1) : count} ${units[unit]}`;
}

// -- the list ------------------------------------------------------------------------------------

const rows = [...document.querySelectorAll("tr[data-run]")];
const chosen = { words: "", grade: "", cell: "" };

function filter() {
  let count = 0;
  const words = chosen.words.toLowerCase().split(/\s+/).filter(Boolean);
  for (const row of rows) {
    row.words ??= row.textContent.toLowerCase();
    const fits =
      (!chosen.grade || row.dataset.grade === chosen.grade) &&
      (!chosen.cell || row.dataset.cells.split(" ").includes(chosen.cell)) &&
      words.every((word) => row.words.includes(word));
    row.hidden = !fits;
    count += fits;
  }
  byId("count").textContent = `${count} of ${rows.length}`;
  for (const button of document.querySelectorAll("button[data-grade]"))
    button.ariaPressed = String(button.dataset.grade === chosen.grade);
  for (const button of document.querySelectorAll("button[data-cell]"))
    button.ariaPressed = String(button.dataset.cell === chosen.cell);
}

function choose(key, value) {
  chosen[key] = chosen[key] === value ? "" : value;
  filter();
}

byId("filter").hidden = false;
byId("words").addEventListener("input", (event) => {
  chosen.words = event.target.value;
  filter();
});
byId("all").addEventListener("click", () => {
  Object.assign(chosen, { words: "", grade: "", cell: "" });
  byId("words").value = "";
  filter();
});
for (const button of document.querySelectorAll("button[data-grade]"))
  button.addEventListener("click", () => choose("grade", button.dataset.grade));
for (const button of document.querySelectorAll("button[data-cell]"))
  button.addEventListener("click", () => {
    choose("cell", button.dataset.cell);
    byId("filter").scrollIntoView({ block: "start" });
  });
filter();

// -- a run's page --------------------------------------------------------------------------------

async function unpack(index) {
  const text = byId(`data-${index}`).textContent;
  const packed = Uint8Array.from(atob(text), (character) => character.charCodeAt(0));
  const stream = new Blob([packed]).stream().pipeThrough(new DecompressionStream("deflate-raw"));
  return JSON.parse(await new Response(stream).text());
}

let opened = 0;
let leave = () => {};
let scrolled = 0;

async function route() {
  const match = /^#run-(\d+)$/.exec(location.hash);
  const ticket = ++opened;
  leave();
  leave = () => {};
  if (!match || !byId(`data-${match[1]}`)) {
    byId("run").hidden = true;
    byId("run").replaceChildren();
    if (byId("index").hidden) {
      byId("index").hidden = false;
      window.scrollTo(0, scrolled);
    }
    return;
  }
  const index = Number(match[1]);
  let content;
  try {
    content = page(index, await unpack(index));
  } catch (error) {
    content = [make("p", { class: "broken" }, `This run can't be shown here: ${error}`), back()];
  }
  if (ticket !== opened) return;
  if (!byId("index").hidden) scrolled = window.scrollY;
  byId("index").hidden = true;
  byId("run").hidden = false;
  byId("run").replaceChildren(...content);
  byId("run").dataset.shown = index;
  window.scrollTo(0, 0);
  window.dispatchEvent(new Event("resize"));
}

const back = () => make("a", { href: "#" }, "All runs");

function neighbours(index) {
  const visible = rows.filter((row) => !row.hidden).map((row) => Number(row.dataset.run));
  const at = visible.indexOf(index);
  const button = (text, to) =>
    make("button", {
      ...(to === undefined ? { disabled: "" } : {}),
      onclick: () => { location.hash = `#run-${to}`; },
    }, text);
  return make("div", { class: "bar" }, back(), button("previous", visible[at - 1]),
    button("next", at < 0 ? visible[0] : visible[at + 1]),
    make("span", { class: "dim" }, at < 0 ? "" : `${at + 1} of ${visible.length}`));
}

function page(index, run) {
  const log = consoleOf(run);
  const timeline = timelineOf(run, log);
  leave = timeline.close;
  const held = { true: ["held", "held"], false: ["broken", "broken"], null: ["dim", "not judged"] };
  return [
    neighbours(index),
    make("h1", {}, run.title, " ", make("span", { class: run.grade }, run.verdict)),
    make("p", { class: "dim" }, run.fault || "no fault"),
    run.cause && make("p", { class: `cause of-${run.grade}`, id: "cause" }, run.cause),
    make("ul", {}, ...run.did.map((line) => make("li", {}, line))),
    make("h2", {}, "Timeline"),
    timeline.element,
    run.left_out.length
      ? make("p", { class: "dim" }, "To keep this file small it shows ",
          run.left_out.map(([what, shown, of]) => `${shown} of ${of} ${what}`).join(", "), ".")
      : "",
    make("h2", {}, "Console"),
    log.element,
    make("h2", {}, "Findings"),
    make("table", {}, ...run.findings.map(([number, name, result, evidence]) =>
      make("tr", {}, make("td", {}, String(number)), make("td", {}, name),
        make("td", { class: held[result][0] }, held[result][1]), make("td", {}, evidence)))),
    make("details", {}, make("summary", {}, `What happened, in words (${run.moments.length})`),
      make("table", { class: "moments" }, ...run.moments.map(([at, source, text]) =>
        make("tr", {}, make("td", { class: "dim" }, seconds(at)), make("td", {}, source),
          make("td", {}, text))))),
    run.error && make("details", {}, make("summary", {}, "Error"), make("pre", {}, run.error)),
    make("dl", {}, ...[["scenario", run.scenario], ["rig", run.rig], ["seed", run.seed],
      ["duration", `${run.elapsed.toFixed(1)} s`], ...run.facts]
      .flatMap(([key, value]) => [make("dt", {}, key), make("dd", {}, String(value))])),
  ].filter((element) => element !== "");
}

// -- the console ---------------------------------------------------------------------------------

function consoleOf(run) {
  const kinds = { TX: "tx", "--": "note" };
  const marks = { RX: "", TX: "→", "--": "·" };
  const list = make("div", { class: "console", tabindex: "0", role: "log", "aria-label": "console" });
  const lines = run.lines.map(([at, direction, text]) => {
    const line = make("div", { class: kinds[direction] ?? "" }, make("span", {}, at.toFixed(3)),
      make("span", {}, marks[direction] ?? ""), make("span", {}, text));
    list.append(line);
    return { at, line };
  });
  if (!lines.length) list.append(make("p", { class: "dim" }, "nothing"));
  let here = null;
  return {
    element: list,
    lines,
    onpick: (pick) => lines.forEach(({ at, line }) => line.addEventListener("click", () => pick(at))),
    goTo(at) {
      here?.classList.remove("here");
      here = nearest(lines.map((each) => [each.at, each.line]), at, Infinity)?.[1];
      if (!here) return;
      here.classList.add("here");
      list.scrollTop = here.offsetTop - list.clientHeight / 2;
    },
    window(from, to) {
      for (const { at, line } of lines) line.classList.toggle("outside", at < from || at > to);
    },
  };
}

// -- the timeline --------------------------------------------------------------------------------

const SPANS = {
  off: "off", starting: "starting", Idle: "idle", Sync: "idle", Download: "download",
  ArtifactInstall: "install", Installed: "wait", ArtifactReboot: "wait",
  ArtifactVerifyReboot: "trial", ArtifactCommit: "commit", Cleanup: "cleanup",
};
const KINDS = { write: "write", "write-zeroes": "zeroes", discard: "discard", flush: "flush" };
const LINES = { power: "power", fault: "fault", network: "network", boot: "boot" };
const LEFT = 118, RIGHT = 10, GAP = 7, LEAST_S = 0.002;

function timelineOf(run, log) {
  const end = Math.max(run.elapsed, 0.001, ...run.moments.map((moment) => moment[0]),
    ...run.operations.map((operation) => operation[0]));
  const view = { from: 0, to: end };
  const canvas = make("canvas", { tabindex: "0", role: "img", "aria-label":
    `Timeline of ${end.toFixed(1)} seconds; the same stands in words below, under What happened` });
  const tip = make("div", { class: "tip", hidden: "" });
  const tracks = tracksOf(run);
  const height = tracks.at(-1).top + tracks.at(-1).height + 26;
  let here = null, drag = null, waiting = false;

  const width = () => canvas.clientWidth - LEFT - RIGHT;
  const x = (at) => LEFT + ((at - view.from) / (view.to - view.from)) * width();
  const time = (px) => view.from + ((px - LEFT) / width()) * (view.to - view.from);

  function redraw() {
    if (waiting) return;
    waiting = true;
    requestAnimationFrame(() => {
      waiting = false;
      draw();
    });
  }

  function draw() {
    const scale = window.devicePixelRatio || 1;
    if (!canvas.clientWidth) return;
    canvas.style.height = `${height}px`;
    canvas.width = Math.round(canvas.clientWidth * scale);
    canvas.height = Math.round(height * scale);
    const pen = canvas.getContext("2d");
    pen.scale(scale, scale);
    pen.font = "11.5px system-ui, sans-serif";
    pen.textBaseline = "middle";
    const colours = new Proxy({}, { get: (known, name) => (known[name] ??= colour(name)) });
    const edge = LEFT + width();
    for (const track of tracks) {
      pen.textAlign = "right";
      pen.fillStyle = colours.dim;
      pen.fillText(track.name, LEFT - 8, track.top + track.height / 2, LEFT - 12);
      pen.fillStyle = colours.soft;
      pen.fillRect(LEFT, track.top, width(), track.height);
    }
    pen.save();
    pen.beginPath();
    pen.rect(LEFT, 0, width(), height);
    pen.clip();
    for (const track of tracks) track.draw(pen, { x, view, colours, width: width() });
    if (here !== null) {
      pen.strokeStyle = colours.link;
      pen.beginPath();
      pen.moveTo(x(here), 0);
      pen.lineTo(x(here), height - 20);
      pen.stroke();
    }
    pen.restore();
    pen.fillStyle = colours.dim;
    pen.textAlign = "center";
    for (const tick of ticks(view, width() / 90)) {
      pen.fillRect(Math.round(x(tick)), height - 20, 1, 4);
      if (x(tick) > LEFT + 14 && x(tick) < edge - 14)
        pen.fillText(`${+tick.toFixed(4)} s`, x(tick), height - 8);
    }
    canvas.dataset.from = view.from;
    canvas.dataset.to = view.to;
    whole.disabled = view.from <= 0 && view.to >= end;
  }

  function show(from, to) {
    const span = Math.min(end, Math.max(LEAST_S, to - from));
    view.from = Math.min(Math.max(0, from), end - span);
    view.to = view.from + span;
    log.window(view.from, view.to);
    redraw();
  }

  function zoom(factor, around = (view.from + view.to) / 2) {
    show(around - (around - view.from) * factor, around + (view.to - around) * factor);
  }

  const pan = (share) => {
    const by = (view.to - view.from) * share;
    show(view.from + by, view.to + by);
  };

  function pick(at, scroll) {
    here = at;
    if (at < view.from || at > view.to) show(at - (view.to - view.from) / 2, at + (view.to - view.from) / 2);
    if (scroll) log.goTo(at);
    redraw();
  }

  function told(event) {
    const box = canvas.getBoundingClientRect();
    const px = event.clientX - box.left, py = event.clientY - box.top;
    const track = tracks.find((each) => py >= each.top - 2 && py <= each.top + each.height + 2);
    const text = track && px >= LEFT && track.tell(time(px), (view.to - view.from) / width() * 5,
      (py - track.top) / track.height);
    tip.hidden = !text;
    if (!text) return;
    tip.textContent = text;
    tip.style.left = `${Math.min(px + 14, Math.max(0, box.width - 320))}px`;
    tip.style.top = `${track.top + track.height + 6}px`;
  }

  canvas.addEventListener("wheel", (event) => {
    event.preventDefault();
    const around = time(event.clientX - canvas.getBoundingClientRect().left);
    if (event.shiftKey || Math.abs(event.deltaX) > Math.abs(event.deltaY))
      pan(Math.sign(event.deltaX || event.deltaY) * 0.1);
    else zoom(event.deltaY < 0 ? 0.8 : 1.25, around);
  }, { passive: false });
  canvas.addEventListener("pointerdown", (event) => {
    canvas.setPointerCapture(event.pointerId);
    drag = { px: event.clientX, from: view.from, to: view.to, moved: false };
  });
  canvas.addEventListener("pointermove", (event) => {
    if (!drag) {
      told(event);
      return;
    }
    const by = ((drag.px - event.clientX) / width()) * (drag.to - drag.from);
    drag.moved ||= Math.abs(drag.px - event.clientX) > 3;
    if (drag.moved) show(drag.from + by, drag.to + by);
  });
  canvas.addEventListener("pointerup", (event) => {
    if (drag && !drag.moved) pick(time(event.clientX - canvas.getBoundingClientRect().left), true);
    drag = null;
  });
  canvas.addEventListener("pointercancel", () => { drag = null; });
  canvas.addEventListener("pointerleave", () => { tip.hidden = true; });
  canvas.addEventListener("dblclick", () => show(0, end));
  canvas.addEventListener("keydown", (event) => {
    const keys = {
      "+": () => zoom(0.7), "=": () => zoom(0.7), "-": () => zoom(1.4), 0: () => show(0, end),
      ArrowLeft: () => pan(-0.15), ArrowRight: () => pan(0.15),
      Home: () => show(0, view.to - view.from), End: () => show(end - (view.to - view.from), end),
    };
    if (!keys[event.key]) return;
    event.preventDefault();
    keys[event.key]();
  });
  log.onpick((at) => pick(at, false));
  const button = (text, title, action) => make("button", { title, onclick: action }, text);
  const whole = button("whole run", "show all of it (0)", () => show(0, end));
  const jumps = run.strikes.slice(0, 8).map(([at, , what, state]) =>
    button(`⚡ ${what}`, `${seconds(at)}, in ${state}`, () => {
      show(at - 1.5, at + 1.5);
      pick(at, true);
    }));
  const resized = () => redraw();
  window.addEventListener("resize", resized);
  const dark = matchMedia("(prefers-color-scheme: dark)");
  dark.addEventListener("change", resized);
  return {
    element: make("div", {},
      make("div", { class: "bar" }, button("+", "closer (+)", () => zoom(0.5)),
        button("−", "wider (-)", () => zoom(2)), whole, ...jumps,
        make("span", { class: "dim" }, "wheel: zoom · drag: move · click: find in the console")),
      make("div", { class: "timeline" }, canvas, tip)),
    close: () => {
      window.removeEventListener("resize", resized);
      dark.removeEventListener("change", resized);
    },
  };
}

function ticks(view, most) {
  const rough = (view.to - view.from) / Math.max(1, most);
  const power = 10 ** Math.floor(Math.log10(rough));
  const step = [1, 2, 5, 10].map((each) => each * power).find((each) => each >= rough);
  const found = [];
  for (let at = Math.ceil(view.from / step) * step; at <= view.to; at += step) found.push(at);
  return found;
}

// A track: its name and place, how it is drawn, and what it tells of a moment.
function tracksOf(run) {
  const tracks = [];
  let top = 8;
  const add = (name, height, draw, tell) => {
    tracks.push({ name, top, height, tell });
    const place = tracks.at(-1);
    place.draw = (pen, on) => draw(pen, on, place);
    top += height + GAP;
  };
  addSpans(run, add);
  addMarks(run, add, tracks);
  addTraffic(run, add);
  addConsole(run, add);
  addDisks(run, add);
  return tracks;
}

function addSpans(run, add) {
  add("doing", 22, (pen, { x, colours }, { top, height }) => {
    pen.textAlign = "left";
    for (const [name, from, to] of run.spans) {
      const left = x(from), wide = x(to) - left;
      pen.fillStyle = colours[SPANS[name] ?? "back"];
      pen.fillRect(left, top, Math.max(1, wide - 0.5), height);
      const seen = Math.max(left, LEFT);
      if (left + wide - seen > pen.measureText(name).width + 8) {
        pen.fillStyle = name === "Idle" || name === "off" || name === "Sync" ? colours.ink : "#fff";
        pen.fillText(name, seen + 4, top + height / 2 + 0.5);
      }
    }
  }, (at) => {
    const span = run.spans.find(([, from, to]) => from <= at && at < to);
    return span && `${span[0]}, ${seconds(span[2] - span[1])}, from ${seconds(span[1])}`;
  });
}

function nearest(items, at, reach) {
  let best = null;
  for (const item of items) {
    const off = Math.abs(item[0] - at);
    if (off <= reach && (!best || off < Math.abs(best[0] - at))) best = item;
  }
  return best;
}

function addMarks(run, add, tracks) {
  for (const [name, sources] of [["faults", ["fault", "power"]], ["boots", ["boot"]],
    ["connections", ["network", "server"]]]) {
    const marks = run.moments.filter(([, source]) => sources.includes(source));
    if (!marks.length) continue;
    add(name, 14, (pen, { x, colours }, { top, height }) => {
      for (const [at, source] of marks) {
        pen.fillStyle = colours[LINES[source] ?? "dim"];
        if (name === "faults") {
          pen.globalAlpha = 0.45;
          pen.fillRect(x(at) - 0.5, 0, 1, tracks.at(-1).top + tracks.at(-1).height);
          pen.globalAlpha = 1;
        }
        pen.beginPath();
        pen.moveTo(x(at) - 5, top);
        pen.lineTo(x(at) + 5, top);
        pen.lineTo(x(at), top + height);
        pen.fill();
      }
    }, (at, reach) => {
      const mark = nearest(marks, at, reach);
      return mark && `${seconds(mark[0])}  ${mark[1]}: ${mark[2]}`;
    });
  }
}

function addTraffic(run, add) {
  if (run.traffic.length < 2) return;
  const samples = run.traffic;
  const rates = samples.slice(1).map(([at, up, down], before) => {
    const [then, upThen, downThen] = samples[before];
    const lasted = Math.max(0.02, at - then);
    return [then, at, (up - upThen) / lasted, (down - downThen) / lasted];
  });
  const most = Math.max(1, ...rates.map((rate) => Math.max(rate[2], rate[3])));
  add("network", 34, (pen, { x, colours }, { top, height }) => {
    const tall = (rate) => (rate > 0 ? Math.max(1, (Math.sqrt(rate / most)) * height) : 0);
    for (const [from, to, up, down] of rates) {
      const left = x(from), wide = Math.max(1, x(to) - left);
      pen.fillStyle = colours.down;
      pen.fillRect(left, top + height - tall(down), wide, tall(down));
      pen.fillStyle = colours.network;
      pen.fillRect(left, top + height - tall(up), wide, Math.min(2, tall(up)));
    }
  }, (at) => {
    const rate = rates.find(([from, to]) => from <= at && at < to);
    const sample = samples.findLast((each) => each[0] <= at) ?? samples[0];
    return `${bytes(sample[2])} to the device and ${bytes(sample[1])} from it so far` +
      (rate ? `; ${bytes(Math.round(rate[3]))}/s and ${bytes(Math.round(rate[2]))}/s` : "");
  });
}

function addConsole(run, add) {
  if (!run.lines.length) return;
  add("console", 14, (pen, { x, colours, view }, { top, height }) => {
    pen.globalAlpha = 0.6;
    for (const [at, direction] of run.lines) {
      if (at < view.from || at > view.to) continue;
      pen.fillStyle = direction === "TX" ? colours.link : direction === "--" ? colours.rig : colours.ink;
      pen.fillRect(x(at) - 0.5, top, 1, height);
    }
    pen.globalAlpha = 1;
  }, (at, reach) => {
    const line = nearest(run.lines, at, reach);
    return line && `${seconds(line[0])}  ${line[1]}  ${line[2]}`;
  });
}

function addDisks(run, add) {
  const name = ([, number, kind, device, offset, length]) =>
    kind === "flush" ? `operation ${number}: flush of ${device}`
      : `operation ${number}: ${kind}, ${bytes(length)} at ${offset} of ${device}`;
  const flushes = run.operations.filter((operation) => operation[2] === "flush");
  if (flushes.length)
    add("flushes", 12, (pen, { x, colours, view }, { top, height }) => {
      pen.fillStyle = colours.flush;
      for (const [at] of flushes)
        if (at >= view.from && at <= view.to) pen.fillRect(x(at) - 0.5, top, 1, height);
    }, (at, reach) => {
      const flush = nearest(flushes, at, reach);
      return flush && `${seconds(flush[0])}  ${name(flush)}`;
    });
  for (const [region, device, start, size] of run.regions) {
    const inside = run.operations.filter(([, , kind, where, offset, length]) =>
      kind !== "flush" && where === device && offset < start + size && offset + length > start);
    add(region, 26, (pen, { x, colours, view }, { top, height }) => {
      for (const [at, , kind, , offset, length] of inside) {
        if (at < view.from || at > view.to) continue;
        const place = Math.max(0, offset - start) / size * height;
        const tall = Math.max(1.5, Math.min(length, size) / size * height);
        pen.fillStyle = colours[KINDS[kind] ?? "ink"];
        pen.fillRect(x(at) - 0.75, top + Math.min(place, height - tall), 1.5, tall);
      }
    }, (at, reach, share) => {
      const close = inside.filter((each) => Math.abs(each[0] - at) <= reach);
      const place = start + share * size;
      close.sort((a, b) => Math.abs(a[4] - place) - Math.abs(b[4] - place));
      return close.length ? `${seconds(close[0][0])}  ${name(close[0])}` : "";
    });
  }
}

window.addEventListener("hashchange", route);
route();
