// The form: a text, a file or a stored document, and a question about it.

import { ApiError, post, upload } from "./api.js";
import { byId, setText, short, show, speak } from "./dom.js";

const MAX_NAME = 60;

/** Let the form submit jobs; `opened(job)` is called with each, `changed()` when a document was added. */
export function makeAsk(opened, changed) {
  const form = byId("ask");
  const button = byId("submit");
  const problem = byId("ask-error");
  for (const radio of form.elements.source) radio.addEventListener("change", showSource);
  form.addEventListener("submit", async (event) => {
    event.preventDefault();
    setText(problem, "");
    button.disabled = true;
    try {
      opened(await submit(changed));
      byId("question").value = "";
    } catch (error) {
      setText(problem, error.message);
    } finally {
      button.disabled = false;
      setText(button, "Ask");
    }
  });
  showSource();
}

/** Choose a stored document, and go to the question. */
export function askAbout(documentId) {
  choose("stored");
  byId("stored").value = documentId;
  byId("question").focus();
}

function choose(source) {
  byId("ask").elements.source.value = source;
  showSource();
}

function showSource() {
  const source = byId("ask").elements.source.value;
  for (const field of document.querySelectorAll("[data-source]")) show(field, field.dataset.source === source);
}

async function submit(changed) {
  const question = byId("question").value;
  if (!question.trim()) throw new ApiError(400, "The question is empty.");
  let id = byId("stored").value;
  if (byId("ask").elements.source.value !== "stored") {
    const [name, blob] = await given();
    setText(byId("submit"), "Sending");
    speak("The document is being sent.", false);
    ({ id } = await upload(name, blob));
    await changed();
  }
  if (!id) throw new ApiError(400, "There is no stored document yet: give a text or a file.");
  const headers = { "Idempotency-Key": crypto.getRandomValues(new Uint32Array(4)).join("-") };
  const body = { document_id: id, questions: [question], max_tokens: Number(byId("max-tokens").value) };
  const job = await post("/v1/jobs", body, headers);
  choose("stored");
  byId("stored").value = id;
  return job;
}

/** Return name and content of the document that the form has. */
async function given() {
  if (byId("ask").elements.source.value === "text") {
    const text = byId("text").value;
    if (!text.trim()) throw new ApiError(400, "The text is empty.");
    return [short(text, MAX_NAME), new Blob([text])];
  }
  const [file] = byId("file").files;
  if (!file) throw new ApiError(400, "Choose a file.");
  const content = await file.arrayBuffer();
  try {
    new TextDecoder("utf-8", { fatal: true }).decode(content);
  } catch {
    const way = "PDF and Office files, folders and other encodings are read by the command line: longreach docs add";
    throw new ApiError(400, `${file.name} is not UTF-8 text. ${way}`);
  }
  return [file.name, new Blob([content])];
}
