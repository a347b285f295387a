// The page of the service: sign-in, and which view an account sees. Everything comes from this server.

import { showAccounts } from "./accounts.js";
import { closeResult } from "./result.js";
import { attempt, call, element, getJson, onSubmit, say, session, show, whenSignedOut } from "./server.js";
import { showWorklist, stopWorklist } from "./worklist.js";

function signedOut() {
  stopWorklist();
  closeResult();
  Object.assign(session, { csrf: "", account: null });
  // The next person at this screen sees nothing of the last one.
  for (const id of ["secret", "accounts", "predictions"]) {
    element(id).replaceChildren();
  }
  element("who").hidden = true;
  show("sign-in-view");
}

async function signedIn({ csrf, account }) {
  Object.assign(session, { csrf, account });
  const site = account.site === "*" ? "every site" : account.site;
  element("account").textContent = `${account.name}, ${account.role}, ${site}`;
  element("who").hidden = false;
  if (account.role === "administrator") {
    show("account-view");
    await showAccounts();
  } else if (account.role === "auditor") {
    show("");
    say("Auditors read the log with GET /v1/log.");
  } else {
    await showWorklist();
  }
}

onSubmit("sign-in", async (fields, form) => {
  const json = { name: fields.name.value, password: fields.password.value, code: fields.code.value, cookie: true };
  const opened = await (await call("POST", "/v1/sign-in", { json })).json();
  form.reset();
  await signedIn(opened);
});

onSubmit("redeem", async (fields, form) => {
  const json = { secret: fields.secret.value, password: fields.password.value };
  const account = await (await call("POST", "/v1/redeem", { json })).json();
  form.reset();
  form.closest("details").open = false;
  element("sign-in").elements.name.value = account.name;
  say(`The account ${account.name} exists now; sign in with its password.`);
});

element("sign-out").addEventListener("click", () => attempt(async () => {
  await call("POST", "/v1/sign-out");
  signedOut();
}));

element("back").addEventListener("click", () => attempt(async () => {
  closeResult();
  await showWorklist();
}));

whenSignedOut(signedOut);
getJson("/v1/me").then(signedIn).catch(signedOut);
