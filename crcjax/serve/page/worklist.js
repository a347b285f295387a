// The worklist, and the upload of slides.

import { openResult } from "./result.js";
import { attempt, button, call, element, getJson, made, onSubmit, show } from "./server.js";

const CHUNK_BYTES = 8 * 2 ** 20;
let refreshTimer = 0;
// The `before` of the page that is shown; null for the newest.
let before = null;
let older = null;

export async function showWorklist() {
  show("work-view");
  await refresh();
}

export function stopWorklist() {
  clearTimeout(refreshTimer);
  before = null;
}

function statusText(item) {
  if (item.status === "queued") {
    const ahead = item.position === 0 ? "next" : `${item.position} ahead`;
    const wait = item.expected_s === null ? "" : `, about ${Math.ceil(item.expected_s / 60)} min`;
    return `queued, ${ahead}${wait}`;
  }
  if (item.status === "running") {
    return `running${item.stage && `, ${item.stage}`} (${Math.round(100 * item.progress)} %)`;
  }
  return item.reason ? `${item.status}: ${item.reason}` : item.status;
}

function signedText({ status, signed }) {
  if (!signed) {
    return status === "done" ? "no" : "";
  }
  const calls = signed.calls.map((name) => name || "none").join(", ");
  return signed.meaning === "agree" ? `agreed, ${signed.signer}` : `other call: ${calls}, ${signed.signer}`;
}

function actionOf(item) {
  if (item.status === "done") {
    return button("Open", `Open the result of ${item.case_id}`, async () => {
      stopTimer();
      await openResult(item);
    });
  }
  if (item.status === "queued" || item.status === "running") {
    return button("Cancel", `Cancel ${item.case_id}`, async () => {
      await call("POST", `/v1/predictions/${item.id}/cancel`);
      await refresh();
    });
  }
  return "";
}

function rowOf(item) {
  const row = document.createElement("tr");
  row.dataset.status = item.status;
  const entropies = item.entropies.filter((value) => value !== null);
  const cells = [
    item.case_id,
    new Date(1000 * item.requested_s).toLocaleString(),
    item.urgent ? "urgent" : "routine",
    statusText(item),
    item.qc.join(", "),
    item.calls.map((name) => name || "none").join(", "),
    entropies.length ? Math.max(...entropies).toFixed(2) : "",
    signedText(item),
    actionOf(item),
  ];
  for (const content of cells) {
    const cell = made("td");
    cell.append(content);
    row.append(cell);
  }
  row.children[2].className = item.urgent ? "urgent" : "";
  return row;
}

function stopTimer() {
  clearTimeout(refreshTimer);
}

// Redraws the worklist, and comes back sooner while something moves.
async function refresh() {
  stopTimer();
  const page = await getJson(`/v1/predictions${before === null ? "" : `?before=${before}`}`);
  const focused = document.activeElement?.getAttribute("aria-label");
  element("predictions").replaceChildren(...page.items.map(rowOf));
  if (focused) {
    element("predictions").querySelector(`[aria-label="${CSS.escape(focused)}"]`)?.focus();
  }
  older = page.next;
  element("older").disabled = older === null;
  element("newest").disabled = before === null;
  const isMoving = page.items.some((item) => item.status === "queued" || item.status === "running");
  stopTimer();
  refreshTimer = setTimeout(() => attempt(refresh), isMoving ? 1000 : 10000);
}

async function upload(file, caseId, urgent) {
  const bar = element("sent");
  bar.hidden = false;
  try {
    const body = { name: file.name, case_id: caseId, bytes: file.size };
    let state = { upload: await (await call("POST", "/v1/uploads", { json: body })).json(), slide: null };
    const path = `/v1/uploads/${state.upload.id}`;
    let failures = 0;
    while (!state.slide) {
      const offset = state.upload.offset;
      bar.value = offset / file.size;
      try {
        const chunk = file.slice(offset, offset + CHUNK_BYTES);
        state = await (await call("PATCH", path, { body: chunk, headers: { "Upload-Offset": String(offset) } })).json();
        failures = 0;
      } catch (error) {
        // A broken connection, or a chunk of which only the answer was lost: the service knows how much has arrived.
        failures += 1;
        if (failures > 5 || (error.status && error.status !== 409 && error.status !== 404)) {
          throw error;
        }
        await new Promise((resolve) => setTimeout(resolve, 500 * failures));
        state = await getJson(path);
      }
    }
    return state.slide.id;
  } finally {
    bar.hidden = true;
  }
}

onSubmit("upload", async (fields, form) => {
  const submit = form.querySelector("button");
  submit.disabled = true;
  try {
    const slides = [];
    for (const file of fields.file.files) {
      slides.push(await upload(file, fields.case.value, fields.urgent.checked));
    }
    const headers = { "Idempotency-Key": crypto.randomUUID() };
    await call("POST", "/v1/predictions", { json: { slides, urgent: fields.urgent.checked }, headers });
    form.reset();
    before = null;
    await refresh();
  } finally {
    submit.disabled = false;
  }
});

element("older").addEventListener("click", () => attempt(async () => {
  before = older;
  await refresh();
}));

element("newest").addEventListener("click", () => attempt(async () => {
  before = null;
  await refresh();
}));

for (const name of ["dragover", "dragleave", "drop"]) {
  element("drop").addEventListener(name, (event) => {
    event.preventDefault();
    element("drop").classList.toggle("over", name === "dragover");
    if (name === "drop" && event.dataTransfer.files.length) {
      element("upload").elements.file.files = event.dataTransfer.files;
    }
  });
}
