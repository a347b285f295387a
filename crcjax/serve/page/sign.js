// Signatures of a result: who signed it, and the form by which a pathologist does.

import { attempt, call, element, getJson, made, onSubmit, say, session } from "./server.js";

const STATEMENTS = {
  agree: "I have reviewed the slides of this case and agree with the predicted class",
  disagree: "I have reviewed the slides of this case and make another call",
};
let shown = null;

export function closeSignatures() {
  shown = null;
  element("signatures").replaceChildren();
  element("sign").reset();
  element("totp-secret").textContent = "";
}

export async function showSignatures(id, result) {
  closeSignatures();
  shown = { id, result };
  element("sign-call").replaceChildren(...[...result.classes, "not evaluable"].map((name) => made("option", name)));
  await readSignatures();
  const maySign = session.account.role === "pathologist";
  element("sign").hidden = !(maySign && session.account.has_totp);
  element("no-totp").hidden = !(maySign && !session.account.has_totp);
  element("agree-choice").disabled = !result.slides.some((slide) => slide.call);
  element("disagree-choice").checked = element("agree-choice").disabled;
  update();
}

async function readSignatures() {
  const history = await getJson(`/v1/predictions/${shown.id}/signatures`);
  shown.versions = history.versions.length;
  const items = history.versions.map((version) => {
    const when = new Date(1000 * version.signed_s).toLocaleString();
    const calls = version.calls.map((name) => name || "none").join(", ");
    const reason = version.reason && ` Reason: ${version.reason}`;
    return made("li", `${version.signer}, ${when}: ${calls}. ${version.statement}.${reason}`);
  });
  element("signatures").replaceChildren(...items);
  const state = items.length ? "" : "Not signed.";
  element("signed-state").textContent = history.is_intact ? state : "The signatures do not fit the result: tell the administrator.";
  element("sign-title").textContent = items.length ? "Correct the signature" : "Sign";
}

// Another call needs a class and a reason, and so does a correction.
function update() {
  const isOther = element("disagree-choice").checked;
  element("other-call").hidden = !isOther;
  element("sign").elements.reason.required = isOther || shown?.versions > 0;
  element("statement").textContent = `${STATEMENTS[isOther ? "disagree" : "agree"]}.`;
}

for (const id of ["agree-choice", "disagree-choice"]) {
  element(id).addEventListener("change", update);
}

onSubmit("sign", async (fields, form) => {
  const json = {
    result_sha256: shown.result.sha256,
    after_version: shown.versions,
    call: element("disagree-choice").checked ? fields.call.value : null,
    reason: fields.reason.value,
    password: fields.password.value,
    code: fields.code.value,
  };
  try {
    await call("POST", `/v1/predictions/${shown.id}/signatures`, { json });
  } finally {
    fields.password.value = "";
    fields.code.value = "";
  }
  form.reset();
  await readSignatures();
  update();
  say("The signature is recorded.");
  element("sign-heading").focus();
});

element("begin-totp").addEventListener("click", () => attempt(async () => {
  const { uri } = await (await call("POST", "/v1/me/totp")).json();
  element("totp-secret").textContent = `Secret for the authenticator app: ${new URL(uri).searchParams.get("secret")}`;
  element("totp").hidden = false;
  element("totp").elements.code.focus();
}));

onSubmit("totp", async (fields, form) => {
  await call("POST", "/v1/me/totp/confirm", { json: { code: fields.code.value } });
  session.account.has_totp = true;
  form.reset();
  form.hidden = true;
  await showSignatures(shown.id, shown.result);
  say("The second factor is set up: sign-in and signatures ask for its codes from now on.");
});
