// The state of the cluster.

import { byId, bytes, count, duration, h, percent, setFacts, setText } from "./dom.js";

/** Show what `/v1/cluster` says. */
export function showCluster(status) {
  setText(byId("model"), status.model);
  showHealth(status.problem ? `problem: ${status.problem}` : "serving", !status.problem);
  setFacts(byId("cluster"), [
    [status.own_only ? "Jobs of this key" : "Jobs", `${count(status.running)} running, ${count(status.queued)} waiting`],
    ["Context", `${count(status.max_model_len)} tokens`],
    ["KV cache", `${status.own_only ? "" : `${percent(status.kv_usage)} of `}${count(status.kv_tokens)} tokens`],
    ["Stored KV", status.kv_store_max_bytes && !status.own_only ? `${bytes(status.kv_store_bytes)} of ${bytes(status.kv_store_max_bytes)}` : ""],
    ["Recoveries", recoveries(status)],
    ["Up for", duration(status.uptime_s)],
    ["Version", status.version],
  ]);
  const rows = status.stages.map((stage) => [
    stage.stage, stage.rank, stage.state, count(stage.steps_done), bytes(stage.resident_bytes),
  ]);
  const table = byId("stages");
  const key = JSON.stringify(rows);
  if (table.dataset.key === key) return;
  table.dataset.key = key;
  table.replaceChildren(...rows.map(([name, rank, state, ...numbers]) => h("tr", {},
    h("th", { scope: "row" }, name), h("td", {}, rank), h("td", {}, state), ...numbers.map((text) => h("td", { class: "number" }, text)))));
}

/** Say whether the head serves. */
export function showHealth(text, isWell) {
  const element = byId("health");
  setText(element, text);
  element.classList.toggle("bad", !isWell);
}

function recoveries(status) {
  const { repairs, full_restarts: restarts } = status;
  if (!repairs && !restarts) return "";
  return `${count(repairs)} by stages, ${count(restarts)} of all; the last took ${duration(status.last_recovery_s)}`;
}
