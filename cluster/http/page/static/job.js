// One job: its progress, its answers as they come, how it attended, and what can be done with it.

import { follow, get, post, remove } from "./api.js";
import { nameOf } from "./documents.js";
import { byId, count, duration, h, makeBar, progressText, setFacts, setText, show, speak } from "./dom.js";
import { isFinal, markShown, progressOf, showState, titleOf } from "./jobs.js";
import { attentionFigure } from "./layers.js";

let shown = null; // the view of the job that is shown

/** Show a job and follow it to its end; `actions` are `ask(documentId)`, `changed()` and `failed(error)`. */
export async function openJob(jobId, actions, isFocused) {
  closeJob();
  const view = new JobView(jobId, actions);
  shown = view;
  show(byId("job"), true);
  byId("job-body").replaceChildren(view.element);
  markShown(jobId);
  if (isFocused) byId("job-title").focus();
  await view.run();
}

/** Show no job. */
export function closeJob() {
  shown?.stop();
  shown = null;
  show(byId("job"), false);
  byId("job-body").replaceChildren();
  setText(byId("job-title"), "Job");
  markShown("");
}

class JobView {
  constructor(jobId, actions) {
    this.id = jobId;
    this.actions = actions;
    this.stopped = new AbortController();
    this.state = h("span", { class: "state" });
    this.facts = h("dl", { class: "facts" });
    this.bar = makeBar("Read");
    this.progress = h("p", { class: "meta" });
    this.error = h("p", { class: "error", role: "alert" });
    this.answers = h("div", { class: "answers" });
    const button = (text, action) => h("button", { type: "button", onclick: () => this.act(action) }, text);
    this.cancel = button("Cancel", async () => this.update(await post(`/v1/jobs/${jobId}/cancel`)));
    this.again = button("Ask again about this document", async () => actions.ask(this.job.document_id));
    this.remove = button("Delete", async () => {
      if (!window.confirm("Delete this job and its answers?")) return;
      await remove(`/v1/jobs/${jobId}`);
      speak("The job was deleted.");
      location.hash = "";
      byId("jobs-title").setAttribute("tabindex", "-1");
      byId("jobs-title").focus();
    });
    for (const one of [this.cancel, this.again, this.remove]) show(one, false);
    this.element = h("div", {},
      h("div", { class: "top" }, this.state, h("div", { class: "buttons" }, this.cancel, this.again, this.remove)),
      this.progress, this.bar.element, this.error, this.answers, this.facts);
    show(this.bar.element, false);
  }

  stop() {
    this.stopped.abort();
  }

  async act(action) {
    try {
      await action();
      this.actions.changed();
    } catch (error) {
      setText(this.error, error.message);
    }
  }

  /** Read the job, and follow it while it runs. */
  async run() {
    const { signal } = this.stopped;
    try {
      this.update(await get(`/v1/jobs/${this.id}`, signal));
      if (isFinal(this.job.state)) return;
      for await (const event of follow(this.id, this.job.last_event, signal)) this.take(event);
      this.actions.changed();
    } catch (error) {
      if (signal.aborted) return;
      show(this.bar.element, false);
      setText(this.progress, "");
      setText(this.error, error.message);
    }
  }

  take(event) {
    if (event.event === "progress") {
      this.showProgress(event.progress);
    } else if (event.event === "token") {
      if (!this.hasTokens) this.showProgress(null);
      this.hasTokens = true;
      showState(this.state, "decoding");
      this.answerOf(event.question)?.add(event.token);
    } else {
      this.update(event.job, event.event === "ended");
    }
  }

  /** Show what the head says of the job; in between, its events say more. */
  update(job, isWhole = true) {
    const hadEnded = this.job && isFinal(this.job.state);
    this.job = job;
    const ended = isFinal(job.state);
    setText(byId("job-title"), titleOf(job));
    showState(this.state, job.state);
    setText(this.error, job.error);
    if (ended && document.activeElement === this.cancel) byId("job-title").focus(); // the button goes
    show(this.cancel, !ended);
    show(this.remove, ended);
    show(this.again, job.document_id !== "");
    if (!this.views && !job.read) {
      const isOnly = job.answers.length === 1;
      this.views = job.answers.map((answer) => new AnswerView(answer.question, isOnly));
      this.answers.replaceChildren(...this.views.map((view) => view.element));
    }
    if (isWhole) job.answers.forEach((answer, index) => this.views?.[index].update(answer, ended));
    const at = progressOf(job);
    if (ended || this.hasTokens || job.state === "decoding") this.showProgress(null);
    else if (at?.total || this.bar.element.hidden) this.showProgress(at); // a change of state does not say how far it is
    this.showFacts();
    if (ended && !hadEnded) this.sayEnd();
  }

  answerOf(question) {
    return this.views?.[question];
  }

  showProgress(at) {
    const text = progressText(at);
    show(this.bar.element, text !== "");
    setText(this.progress, text || (this.job.state === "queued" ? "waiting for its turn" : ""));
    if (!text) return;
    this.bar.update(at.processed / at.total, text);
    speak(text, false);
  }

  showFacts() {
    const { timings, answers, document_id: documentId, restarts } = this.job;
    const ended = isFinal(this.job.state);
    const sum = (values) => values.reduce((total, value) => total + value, 0);
    setFacts(this.facts, [
      ["Document", nameOf(documentId) || documentId],
      ["Prompt", ended ? tokens(Math.max(0, ...answers.map((one) => one.prompt_tokens))) : ""],
      ["Found stored", ended ? tokens(Math.max(0, ...answers.map((one) => one.cached_tokens))) : ""],
      ["Answer", ended && !this.job.read ? tokens(sum(answers.map((one) => one.token_ids.length))) : ""],
      ["First token after", ended && timings.ttft_s ? duration(timings.ttft_s) : ""],
      ["In all", ended && timings.total_s ? duration(timings.total_s) : ""],
      ["Restarts", restarts ? count(restarts) : ""],
      ["Id", this.id, true],
    ]);
  }

  sayEnd() {
    const { state, read, error, answers } = this.job;
    const text = answers.map(textOf).join(" ").slice(0, 400);
    if (state === "succeeded") speak(read ? "The document has been read." : `Answered. ${text}`);
    else speak(state === "failed" ? `The job has failed. ${error}` : "The job was cancelled.");
  }
}

/** Return the text of an answer, the ids of its tokens where the model has no tokenizer. */
const textOf = (answer) => (answer.text ?? answer.token_ids.join(" ")).trim();

const tokens = (number) => (number ? `${count(number)} tokens` : "");

/** One question and its answer. */
class AnswerView {
  constructor(question, isOnly) {
    this.text = h("p", { class: "answer" });
    this.reasoning = h("p", { class: "answer" });
    this.thought = h("details", {}, h("summary", {}, "Reasoning"), this.reasoning);
    this.end = h("p", { class: "meta" });
    this.attention = h("div");
    show(this.thought, false);
    this.element = h("article", {},
      question && h("h3", { class: isOnly && question.length <= 90 ? "unseen" : "" }, question),
      this.thought, this.text, this.end, this.attention);
  }

  add(token) {
    if (token.reasoning) {
      show(this.thought, true);
      this.reasoning.append(token.reasoning);
    }
    const text = token.part ? token.answer : token.text;
    if (text) this.text.append(this.text.textContent ? text : text.trimStart());
  }

  update(answer, ended) {
    setText(this.text, textOf(answer));
    setText(this.reasoning, answer.reasoning ?? "");
    show(this.thought, Boolean(answer.reasoning));
    const ends = { length: "The answer was cut at its longest length.", cancelled: "Cancelled.", error: "It failed." };
    setText(this.end, ended ? ends[answer.finish_reason] ?? "" : "");
    const figure = answer.finish_reason ? attentionFigure(answer.attention) : null;
    this.attention.replaceChildren(...(figure ? [figure] : []));
  }
}
