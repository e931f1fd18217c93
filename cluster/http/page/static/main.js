// The page: what is asked of the head and when, and the key.

import { get, key, whenUnauthorized } from "./api.js";
import { askAbout, makeAsk } from "./ask.js";
import { showCluster, showHealth } from "./cluster.js";
import { makeDocuments } from "./documents.js";
import { byId, setText, show, speak } from "./dom.js";
import { closeJob, openJob } from "./job.js";
import { isFinal, makeJobs, markShown } from "./jobs.js";

const BUSY_MS = 2000; // between looks while jobs run
const IDLE_MS = 8000;
const PAGE = 20; // jobs
const MAX_JOBS = 100; // that one listing has

const current = { jobs: PAGE, timer: 0, asked: false, isOfAction: false };

const actions = {
  ask: (given) => askAbout(given.id ?? given),
  opened: (job) => open(job.id),
  changed: () => {
    showProblem(null);
    return refresh();
  },
  failed: showProblem,
};
const showDocuments = makeDocuments(actions);
const showJobs = makeJobs();

function open(jobId) {
  current.asked = true;
  if (location.hash === `#${jobId}`) showChosen();
  else location.hash = jobId;
  refresh();
}

/** Show the job that the address names. */
function showChosen() {
  const id = location.hash.slice(1);
  if (/^job_[0-9a-f]{32}$/.test(id)) openJob(id, actions, current.asked);
  else closeJob();
  current.asked = true; // from now on somebody chooses
}

/** Show a problem until there is another, or none; one of an action stays until an action succeeds. */
function showProblem(error, isOfAction = true) {
  if (!error && !isOfAction && current.isOfAction) return;
  current.isOfAction = isOfAction && Boolean(error);
  const banner = byId("banner");
  show(banner, Boolean(error));
  setText(banner, error ? error.message : "");
}

/** Ask the head for everything that is shown, now and again after a while. */
async function refresh() {
  clearTimeout(current.timer);
  let pause = IDLE_MS;
  try {
    const [status, page, { documents }] = await Promise.all([
      get("/v1/cluster"), get(`/v1/jobs?page_size=${current.jobs}`), get("/v1/documents"),
    ]);
    showCluster(status);
    showDocuments(documents);
    showJobs(page.jobs, page.next_page_token !== "" && current.jobs < MAX_JOBS);
    markShown(location.hash.slice(1));
    if (page.jobs.some((job) => !isFinal(job.state))) pause = BUSY_MS;
    showProblem(null, false);
  } catch (error) {
    showHealth(error.status === 401 ? "needs a key" : "not reached", false);
    showProblem(error.status === 401 ? null : error, false);
    pause = error.status === 401 ? 0 : IDLE_MS;
  }
  clearTimeout(current.timer);
  if (pause) current.timer = setTimeout(() => document.hidden || refresh(), pause);
}

function makeKeys() {
  const dialog = byId("key-dialog");
  const ask = (problem) => {
    show(byId("key-button"), true);
    setText(byId("key-error"), problem);
    byId("key").value = "";
    if (!dialog.open) dialog.showModal();
    byId("key").focus();
  };
  whenUnauthorized(() => {
    const wasWrong = key.get() !== null;
    key.clear();
    ask(wasWrong ? "The head does not know this key." : "");
  });
  byId("key-form").addEventListener("submit", (event) => {
    event.preventDefault();
    const given = byId("key").value.trim();
    if (!/^[\x21-\x7e]+$/.test(given)) {
      ask("A key has no spaces and no special characters.");
      return;
    }
    key.set(given);
    dialog.close();
    speak("The key is used from now on.");
    refresh();
    showChosen();
  });
  byId("key-cancel").addEventListener("click", () => dialog.close());
  byId("key-button").addEventListener("click", () => ask(""));
  show(byId("key-button"), key.get() !== null);
}

makeKeys();
makeAsk(actions.opened, actions.changed);
byId("more-jobs").addEventListener("click", () => {
  current.jobs = Math.min(MAX_JOBS, current.jobs + PAGE);
  refresh();
});
window.addEventListener("hashchange", showChosen);
document.addEventListener("visibilitychange", () => document.hidden || refresh());
await refresh();
showChosen();
