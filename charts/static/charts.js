"use strict";
// What charts tell when pointed at, the range of time that is drawn over them, and selectors of what is shown.
(() => {
  const space = "http://www.w3.org/2000/svg";
  const tip = document.createElement("div");
  tip.id = "tip";
  tip.hidden = true;
  tip.setAttribute("aria-hidden", "true");
  document.body.append(tip);
  const known = new WeakMap();

  function data(chart) {
    if (!known.has(chart)) known.set(chart, JSON.parse(chart.dataset.chart || "{}"));
    return known.get(chart);
  }

  function moment(seconds) {
    return new Date(1000 * seconds).toISOString().slice(0, 19).replace("T", " ") + " UTC";
  }

  function place(chart, event) {
    const at = new DOMPoint(event.clientX, event.clientY).matrixTransform(chart.getScreenCTM().inverse());
    return [at.x, at.y];
  }

  function nearest(positions, distance) {
    let best = -1, least = Infinity;
    positions.forEach((position, index) => {
      const far = distance(position);
      if (far < least) [best, least] = [index, far];
    });
    return [best, least];
  }

  function marker(chart, name, attributes) {
    let mark = chart.querySelector("." + name);
    if (!mark) {
      mark = document.createElementNS(space, name === "chosen" ? "rect" : "line");
      mark.setAttribute("class", name);
      chart.append(mark);
    }
    for (const [key, value] of Object.entries(attributes)) mark.setAttribute(key, value);
  }

  function told(chart, event) {
    // A mark's own words, shown at once instead of after the browser's while.
    const title = event.target.querySelector?.(":scope > title");
    if (title) {
      event.target.dataset.told = title.textContent;
      title.remove();
    }
    if (event.target.dataset.told) return event.target.dataset.told;
    const about = data(chart), [x, y] = place(chart, event);
    if (about.at) {
      const [left, top, right, bottom] = about.box;
      if (x < left - 8 || x > right + 8 || y < top || y > bottom) return "";
      const [index] = nearest(about.at, at => Math.abs(at - x));
      marker(chart, "cursor", { x1: about.at[index], x2: about.at[index], y1: top, y2: bottom });
      const [where, ...values] = about.told[index];
      return [about.time ? moment(where) : where, ...values].join("\n");
    }
    if (about.points) {
      const [index, far] = nearest(about.points, ([px, py]) => (px - x) ** 2 + (py - y) ** 2);
      return index >= 0 && far < 400 ? about.points[index][2] : "";
    }
    if (about.cells) {
      const [left, top, wide, tall] = about.cells;
      const column = Math.floor((x - left) / wide), row = Math.floor((y - top) / tall);
      const value = about.values[row]?.[column];
      if (value === undefined || value === null) return "";
      return `${about.rows[0]} ${about.rows[1][row]}, ${about.columns[0]} ${about.columns[1][column]}\n${value}`;
    }
    return "";
  }

  function show(text, event) {
    tip.hidden = !text;
    if (!text) return;
    tip.textContent = text;
    const right = event.clientX + 14 + tip.offsetWidth > window.innerWidth;
    tip.style.left = Math.max(0, right ? event.clientX - 14 - tip.offsetWidth : event.clientX + 14) + "px";
    tip.style.top = Math.min(window.innerHeight - tip.offsetHeight, event.clientY + 14) + "px";
  }

  let drawn = null;

  function limits(about, x) {
    const [, left, , right] = about.time;
    return Math.min(right, Math.max(left, x));
  }

  document.addEventListener("pointerdown", event => {
    const chart = event.target.closest?.("svg.chart");
    if (!chart || !data(chart).time || event.button) return;
    drawn = { chart, from: limits(data(chart), place(chart, event)[0]) };
    event.preventDefault();
  });
  document.addEventListener("pointermove", event => {
    const chart = event.target.closest?.("svg.chart");
    if (!drawn) return show(chart ? told(chart, event) : "", event);
    const about = data(drawn.chart), to = limits(about, place(drawn.chart, event)[0]);
    drawn.to = to;
    marker(drawn.chart, "chosen", {
      x: Math.min(drawn.from, to), width: Math.abs(to - drawn.from), y: about.box[1], height: about.box[3] - about.box[1],
    });
  });
  document.addEventListener("pointerup", () => {
    if (!drawn) return;
    const { chart, from, to } = drawn, [low, left, high, right] = data(chart).time;
    drawn = null;
    chart.querySelector(".chosen")?.remove();
    if (to === undefined || Math.abs(to - from) < 5) return;
    const [since, until] = [Math.min(from, to), Math.max(from, to)].map(
      x => 1000 * (low + (x - left) / (right - left) * (high - low)));
    const written = milliseconds => new Date(milliseconds).toISOString().slice(0, 23);
    const address = new URL(location.href);
    address.search = new URLSearchParams({ since: written(Math.floor(since)), until: written(Math.ceil(until)) });
    location.assign(address);
  });
  document.addEventListener("pointercancel", () => { drawn = null; });
  document.addEventListener("scroll", () => { tip.hidden = true; }, { passive: true, capture: true });

  document.addEventListener("change", event => {
    const select = event.target.closest?.("select[data-choices]");
    if (!select) return;
    for (const choice of document.querySelectorAll(`[data-choice-of="${select.dataset.choices}"]`)) {
      choice.hidden = choice.dataset.choice !== select.value;
    }
  });
})();
