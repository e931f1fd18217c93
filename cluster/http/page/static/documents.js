// Stored documents: their list, and the choice among them in the form.

import { post, remove } from "./api.js";
import { KeyedList, byId, bytes, count, h, setText, show, speak } from "./dom.js";

let known = new Map();

/** Return the name of a stored document, or "" where it is not known. */
export const nameOf = (documentId) => known.get(documentId)?.name ?? "";

/** Keep the list of documents; `actions` are `ask(document)`, `opened(job)`, `changed()` and `failed(error)`. */
export function makeDocuments(actions) {
  const list = new KeyedList(byId("documents"), (one) => one.id, (one) => makeRow(one, actions));
  const options = new KeyedList(byId("stored"), (one) => one.id, (one) => {
    const element = h("option", { value: one.id });
    return { element, update: (now) => setText(element, now.name) };
  });
  return (documents) => {
    known = new Map(documents.map((one) => [one.id, one]));
    const newest = [...documents].sort((a, b) => b.created - a.created);
    list.update(newest);
    options.update(newest);
    show(byId("no-documents"), !documents.length);
  };
}

function makeRow(first, actions) {
  const name = h("span", { class: "name" });
  const facts = h("span", { class: "meta" });
  const id = `name-${first.id}`;
  name.id = id;
  const act = (action) => async () => {
    try {
      await action();
      actions.changed();
    } catch (error) {
      actions.failed(error);
    }
  };
  const button = (text, action) => {
    const element = h("button", { type: "button", class: "small", onclick: act(action) }, text);
    element.id = `${text.toLowerCase()}-${first.id}`;
    element.setAttribute("aria-labelledby", `${element.id} ${id}`);
    return element;
  };
  let current = first;
  const path = `/v1/documents/${first.id}`;
  const pin = button("Pin", () => post(`${path}/pin`, { pinned: !current.pinned }));
  const element = h("li", {},
    h("div", { class: "what" }, name, facts),
    h("div", { class: "buttons" },
      button("Ask", async () => actions.ask(current)),
      button("Read", async () => actions.opened(await post(`${path}/read`))),
      pin,
      button("Delete", async () => {
        if (!window.confirm(`Delete ${current.name} and its stored KV?`)) return;
        await remove(path);
        speak(`${current.name} was deleted.`);
      })));
  return {
    element,
    update(now) {
      current = now;
      setText(name, now.name);
      const parts = [now.tokens ? `${count(now.tokens)} tokens` : "not counted yet", bytes(now.size_bytes)];
      if (now.stored_tokens) parts.push(`KV of ${count(now.stored_tokens)} tokens stored`);
      if (now.pinned) parts.push("pinned");
      setText(facts, parts.join(" · "));
      setText(pin, now.pinned ? "Unpin" : "Pin");
    },
  };
}
