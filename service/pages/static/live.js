"use strict";
// Pages that follow what they show: told that something changed, the page is asked for again and put in place.
(() => {
  const LEAST_MS = 3000;
  const main = document.getElementById("main");
  const state = document.getElementById("live");
  let source = null, due = null, last = 0, shown = main.innerHTML;

  const say = text => { if (state) state.textContent = text; };

  // What somebody types, chooses or marks is not taken from under their hands.
  const busy = () => main.contains(document.activeElement) && document.activeElement.matches("input, select, textarea")
    || !getSelection().isCollapsed || document.querySelector(".chart .chosen");

  const nameOf = element => element && main.contains(element)
    ? element.id || `${element.tagName} ${element.getAttribute("href")} ${element.getAttribute("aria-label")} ${element.textContent}`
    : null;

  function put(fresh) {
    const open = new Map([...main.querySelectorAll("details")].map(d => [d.querySelector("summary").textContent, d.open]));
    const scrolled = [...main.querySelectorAll(".scroll")].map(e => e.scrollLeft);
    const focused = nameOf(document.activeElement);
    shown = fresh.innerHTML;
    main.replaceChildren(...fresh.childNodes);
    for (const details of main.querySelectorAll("details")) {
      const before = open.get(details.querySelector("summary").textContent);
      if (before !== undefined) details.open = before;
    }
    [...main.querySelectorAll(".scroll")].forEach((e, i) => { e.scrollLeft = scrolled[i] || 0; });
    if (focused) {
      for (const element of main.querySelectorAll("a, button, summary, [tabindex]")) {
        if (nameOf(element) === focused) { element.focus({ preventScroll: true }); break; }
      }
    }
  }

  async function refresh() {
    due = null;
    if (busy()) return later();
    last = Date.now();
    try {
      const answer = await fetch(location.href, { headers: { Accept: "text/html" } });
      if (answer.redirected) return location.reload();
      if (!answer.ok) return say("Not up to date: the server did not answer");
      const fresh = new DOMParser().parseFromString(await answer.text(), "text/html").getElementById("main");
      if (busy()) return later();
      if (fresh.innerHTML !== shown) put(fresh);
      say("Live");
      if (!fresh.dataset.live) close();
    } catch {
      say("Not up to date: the server cannot be reached");
    }
  }

  function later() {
    if (due === null) due = setTimeout(refresh, Math.max(200, last + LEAST_MS - Date.now()));
  }

  function open() {
    if (source || !main.dataset.live) return;
    source = new EventSource(main.dataset.live);
    source.addEventListener("open", () => say("Live"));
    source.addEventListener("changed", later);
    source.addEventListener("error", () => say("Not up to date: the server cannot be reached"));
  }

  function close() {
    if (source) source.close();
    source = null;
    say("");
  }

  // A browser has few connections to a server: pages that nobody looks at hold none.
  document.addEventListener("visibilitychange", () => { if (document.hidden) close(); else open(); });
  addEventListener("pagehide", close);
  if (!document.hidden) open();
})();
