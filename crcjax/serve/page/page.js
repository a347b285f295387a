"use strict";

// The page of the service: sign-in, worklist, upload, result. Everything comes from this server.

const CHUNK_BYTES = 8 * 2 ** 20;
const element = (id) => document.getElementById(id);
let csrf = "";
let refreshTimer = 0;

class ServiceError extends Error {
  constructor(status, detail) {
    super(detail);
    this.status = status;
  }
}

async function call(method, path, { json, body, headers = {} } = {}) {
  const options = { method, headers: { ...headers, "X-CSRF-Token": csrf }, credentials: "same-origin" };
  if (json !== undefined) {
    options.body = JSON.stringify(json);
    options.headers["Content-Type"] = "application/json";
  } else if (body !== undefined) {
    options.body = body;
    options.headers["Content-Type"] = "application/octet-stream";
  }
  const response = await fetch(path, options);
  if (!response.ok) {
    const problem = await response.json().catch(() => ({ detail: response.statusText }));
    throw new ServiceError(response.status, problem.detail);
  }
  return response;
}

const getJson = async (path) => (await call("GET", path)).json();

function show(view) {
  for (const id of ["sign-in-view", "work-view", "account-view", "result-view"]) {
    element(id).hidden = id !== view;
  }
}

function say(text) {
  element("message").textContent = text;
}

// Runs an action of the user; what goes wrong is said on the page.
async function attempt(action) {
  say("");
  try {
    await action();
  } catch (error) {
    if (error.status === 401 && !element("who").hidden) {
      signedOut();
    }
    say(error.message);
  }
}

function signedOut() {
  clearTimeout(refreshTimer);
  csrf = "";
  // The next person at this screen sees nothing of the last one.
  for (const id of ["secret", "accounts", "predictions", "result"]) {
    element(id).replaceChildren();
  }
  element("who").hidden = true;
  show("sign-in-view");
}

function siteText(account) {
  return account.site === "*" ? "every site" : account.site;
}

async function signedIn(session) {
  csrf = session.csrf;
  const account = session.account;
  element("account").textContent = `${account.name}, ${account.role}, ${siteText(account)}`;
  element("who").hidden = false;
  if (account.role === "administrator") {
    show("account-view");
    element("invite").elements.site.value = account.site === "*" ? "" : account.site;
    await showAccounts();
  } else if (account.role === "auditor") {
    show("");
    say("Auditors read the log with GET /v1/log.");
  } else {
    show("work-view");
    await refresh();
  }
}

function cell(row, content) {
  const td = document.createElement("td");
  td.append(content);
  row.append(td);
  return td;
}

function button(text, label, action) {
  const made = document.createElement("button");
  made.type = "button";
  made.textContent = text;
  made.setAttribute("aria-label", label);
  made.addEventListener("click", () => attempt(action));
  return made;
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

// Redraws the worklist, and comes back sooner while something moves.
async function refresh() {
  clearTimeout(refreshTimer);
  const focused = document.activeElement?.getAttribute("aria-label");
  const page = await getJson("/v1/predictions");
  const rows = page.items.map((item) => {
    const row = document.createElement("tr");
    row.dataset.status = item.status;
    cell(row, item.case_id);
    cell(row, new Date(1000 * item.requested_s).toLocaleString());
    cell(row, item.urgent ? "urgent" : "routine").className = item.urgent ? "urgent" : "";
    cell(row, statusText(item));
    cell(row, item.calls.map((name) => name || "none").join(", "));
    if (item.status === "done") {
      cell(row, button("Open", `Open the result of ${item.case_id}`, () => open(item)));
    } else if (item.status === "queued" || item.status === "running") {
      cell(row, button("Cancel", `Cancel ${item.case_id}`, async () => {
        await call("POST", `/v1/predictions/${item.id}/cancel`);
        await refresh();
      }));
    } else {
      cell(row, "");
    }
    return row;
  });
  element("predictions").replaceChildren(...rows);
  if (focused) {
    element("predictions").querySelector(`[aria-label="${CSS.escape(focused)}"]`)?.focus();
  }
  const isMoving = page.items.some((item) => item.status === "queued" || item.status === "running");
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
    const headers = { "Idempotency-Key": crypto.randomUUID() };
    await call("POST", "/v1/predictions", { json: { slides: [state.slide.id], urgent }, headers });
  } finally {
    bar.hidden = true;
  }
}

function fact(list, name, value) {
  const dt = document.createElement("dt");
  const dd = document.createElement("dd");
  dt.textContent = name;
  dd.textContent = value;
  list.append(dt, dd);
}

async function open(item) {
  const result = await getJson(`/v1/predictions/${item.id}/result`);
  clearTimeout(refreshTimer);
  element("result").replaceChildren();
  element("result-title").textContent = `Case ${result.case_id}: ${result.target}`;
  for (const slide of result.slides) {
    const list = document.createElement("dl");
    const digits = (value) => (value === null || value === undefined ? "not determined" : value.toFixed(3));
    fact(list, "Predicted class", slide.call || `none: ${slide.reason}`);
    result.classes.forEach((name, index) => {
      if (slide.probs.length) {
        fact(list, `Probability of ${name}`, digits(slide.probs[index]));
      }
    });
    fact(list, "Entropy", `${digits(slide.entropy)} nats`);
    // Heads without evidence have none.
    if (slide.vacuity !== null && slide.vacuity !== undefined) {
      fact(list, "Vacuity", digits(slide.vacuity));
    }
    if (slide.conformal_set) {
      fact(list, "Conformal set", slide.conformal_set.join(", ") || "empty");
    }
    fact(list, "Quality control", [slide.qc_verdict, slide.qc_reasons].filter(Boolean).join(": "));
    fact(list, "Synthetic slide", slide.synthetic ? "yes" : "no");
    element("result").append(list);
    if (slide.call) {
      const picture = document.createElement("img");
      picture.src = `/v1/predictions/${item.id}/slides/${slide.id}/heatmap.png`;
      picture.alt = `The slide beside its copy coloured by attention; predicted class ${slide.call}`;
      element("result").append(picture);
    }
  }
  show("result-view");
  element("result-title").focus();
}

async function showAccounts() {
  const accounts = await getJson("/v1/accounts");
  element("accounts").replaceChildren(...accounts.map((account) => {
    const item = document.createElement("li");
    item.textContent = `${account.name}: ${account.role}, ${siteText(account)}${account.is_disabled ? ", disabled" : ""}`;
    return item;
  }));
}

function onSubmit(id, action) {
  element(id).addEventListener("submit", (event) => {
    event.preventDefault();
    attempt(() => action(event.target.elements, event.target));
  });
}

onSubmit("sign-in", async (fields, form) => {
  const json = { name: fields.name.value, password: fields.password.value, code: fields.code.value, cookie: true };
  const session = await (await call("POST", "/v1/sign-in", { json })).json();
  form.reset();
  await signedIn(session);
});

onSubmit("redeem", async (fields, form) => {
  const json = { secret: fields.secret.value, password: fields.password.value };
  const account = await (await call("POST", "/v1/redeem", { json })).json();
  form.reset();
  form.closest("details").open = false;
  element("sign-in").elements.name.value = account.name;
  say(`The account ${account.name} exists now; sign in with its password.`);
});

onSubmit("upload", async (fields, form) => {
  const submit = form.querySelector("button");
  submit.disabled = true;
  try {
    await upload(fields.file.files[0], fields.case.value, fields.urgent.checked);
    form.reset();
    await refresh();
  } finally {
    submit.disabled = false;
  }
});

onSubmit("invite", async (fields, form) => {
  const json = { name: fields.name.value, role: fields.role.value, site: fields.site.value };
  const made = await (await call("POST", "/v1/accounts", { json })).json();
  element("secret").textContent = made.token
    ? `Token of ${json.name}, shown once: ${made.token}`
    : `Invitation for ${json.name}, shown once, valid for three days: ${made.secret}`;
  form.reset();
  await showAccounts();
});

element("sign-out").addEventListener("click", () => attempt(async () => {
  await call("POST", "/v1/sign-out");
  signedOut();
}));

element("back").addEventListener("click", () => attempt(async () => {
  show("work-view");
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

getJson("/v1/me").then(signedIn).catch(signedOut);
