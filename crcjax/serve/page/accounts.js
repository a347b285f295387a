// Accounts: the administrator's view.

import { call, element, getJson, made, onSubmit, session } from "./server.js";

const siteText = (account) => (account.site === "*" ? "every site" : account.site);

export async function showAccounts() {
  element("invite").elements.site.value = session.account.site === "*" ? "" : session.account.site;
  const accounts = await getJson("/v1/accounts");
  element("accounts").replaceChildren(...accounts.map((account) =>
    made("li", `${account.name}: ${account.role}, ${siteText(account)}${account.is_disabled ? ", disabled" : ""}`)));
}

onSubmit("invite", async (fields, form) => {
  const json = { name: fields.name.value, role: fields.role.value, site: fields.site.value };
  const invitation = await (await call("POST", "/v1/accounts", { json })).json();
  element("secret").textContent = invitation.token
    ? `Token of ${json.name}, shown once: ${invitation.token}`
    : `Invitation for ${json.name}, shown once, valid for three days: ${invitation.secret}`;
  form.reset();
  await showAccounts();
});
