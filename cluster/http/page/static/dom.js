// Elements, and numbers as people read them. Text only ever becomes text nodes and attributes, never markup.

const SVG = "http://www.w3.org/2000/svg";

/** Return the element of an id. */
export const byId = (id) => document.getElementById(id);

function fill(element, attributes, children) {
  for (const [name, value] of Object.entries(attributes)) {
    if (name.startsWith("on")) element.addEventListener(name.slice(2), value);
    else if (value === true) element.setAttribute(name, "");
    else if (value !== false && value != null) element.setAttribute(name, value);
  }
  element.append(...children.filter((child) => child != null && child !== false));
  return element;
}

/** Return a new HTML element; attributes that begin with "on" are listeners. */
export const h = (tag, attributes = {}, ...children) => fill(document.createElement(tag), attributes, children);

/** Return a new SVG element. */
export const s = (tag, attributes = {}, ...children) => fill(document.createElementNS(SVG, tag), attributes, children);

/** Set the text of an element where it differs, so that selections stay. */
export function setText(element, text) {
  if (element.textContent !== text) element.textContent = text;
}

/** Show or hide an element. */
export function show(element, isShown) {
  element.hidden = !isShown;
}

/**
 * Make the children of `parent` those of `items`, keeping the elements of items that stay, and with them the focus.
 * `make(item)` returns an object with `element` and `update(item)`.
 */
export class KeyedList {
  constructor(parent, keyOf, make) {
    Object.assign(this, { parent, keyOf, make, rows: new Map() });
  }

  update(items) {
    const keys = new Set(items.map(this.keyOf));
    for (const [key, row] of this.rows) {
      if (keys.has(key)) continue;
      row.element.remove();
      this.rows.delete(key);
    }
    let next = this.parent.firstElementChild;
    for (const item of items) {
      const key = this.keyOf(item);
      if (!this.rows.has(key)) this.rows.set(key, this.make(item));
      const row = this.rows.get(key);
      row.update(item);
      if (row.element === next) next = next.nextElementSibling;
      else this.parent.insertBefore(row.element, next);
    }
  }
}

/** Return a bar for a share from 0 to 1, with what screen readers call it. */
export function makeBar(label) {
  const fillElement = h("span", { class: "bar-fill" });
  const element = h("span", { class: "bar", role: "progressbar", "aria-label": label, "aria-valuemin": 0,
    "aria-valuemax": 100 }, fillElement);
  return {
    element,
    update(share, text) {
      const percent = Math.round(100 * Math.min(1, Math.max(0, share)));
      fillElement.style.setProperty("width", `${percent}%`);
      element.setAttribute("aria-valuenow", percent);
      element.setAttribute("aria-valuetext", text);
    },
  };
}

/** Fill a list of facts: [name, value, whether it is wide] each, without those that have no value. */
export function setFacts(list, facts) {
  const shown = facts.filter(([, value]) => value !== "" && value != null);
  const key = JSON.stringify(shown);
  if (list.dataset.key === key) return;
  list.dataset.key = key;
  list.replaceChildren(...shown.map(([name, value, isWide]) =>
    h("div", { class: isWide ? "wide" : null }, h("dt", {}, name), h("dd", {}, value))));
}

let lastWords = 0;
const SPEAK_EVERY_MS = 8000;

/** Tell screen readers something; `isNews` goes before the wait that keeps progress from being read all the time. */
export function speak(text, isNews = true) {
  const now = Date.now();
  if (!isNews && now - lastWords < SPEAK_EVERY_MS) return;
  lastWords = now;
  byId("spoken").textContent = text;
}

export const count = (number) => Number(number).toLocaleString("en-US");

export function bytes(size) {
  let value = size;
  for (const unit of ["B", "KiB", "MiB", "GiB"]) {
    if (value < 1024) return `${value >= 100 || unit === "B" ? Math.round(value) : value.toFixed(1)} ${unit}`;
    value /= 1024;
  }
  return `${value.toFixed(1)} TiB`;
}

export function duration(seconds) {
  if (seconds < 10) return `${seconds.toFixed(1)} s`;
  if (seconds < 100) return `${Math.round(seconds)} s`;
  const minutes = Math.round(seconds / 60);
  if (minutes < 60) return `${minutes} min`;
  const hours = Math.floor(minutes / 60);
  return hours < 48 ? `${hours} h ${minutes % 60} min` : `${Math.round(hours / 24)} days`;
}

/** Return a moment, given in seconds since 1970: the time of today, else the date. */
export function when(seconds) {
  const date = new Date(seconds * 1000);
  const isToday = date.toDateString() === new Date().toDateString();
  return isToday
    ? date.toLocaleTimeString([], { hour: "2-digit", minute: "2-digit", second: "2-digit" })
    : date.toLocaleString([], { dateStyle: "medium", timeStyle: "short" });
}

export const percent = (share) => `${(100 * share).toFixed(share < 0.0995 ? 1 : 0)} %`;

/** Return a text cut to some characters. */
export function short(text, length = 90) {
  const line = text.replace(/\s+/g, " ").trim();
  return line.length > length ? `${line.slice(0, length - 1)}…` : line;
}

/** Return how far a prompt was read, in words, "" before it is known. */
export function progressText(at) {
  if (!at || !at.total) return "";
  const cached = at.cached ? `, ${count(at.cached)} of them stored` : "";
  const left = at.eta_ms != null && at.processed < at.total ? `, ${duration(at.eta_ms / 1000)} left` : "";
  return `read ${count(at.processed)} of ${count(at.total)} tokens${cached}${left}`;
}
