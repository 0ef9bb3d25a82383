// Tabs, and what the keyboard does.
import { button, find, make } from "./base.js";

const tabs = [...document.querySelectorAll("[data-tab]")];
let tabOpened = () => {};

export const onTab = (act) => { tabOpened = act; };

export const openTab = (name) => {
    for (const panel of tabs) {
        const open = panel.dataset.tab === name;
        panel.hidden = !open;
        const tab = find(`tab-${panel.id}`);
        tab.setAttribute("aria-selected", String(open));
        tab.tabIndex = open ? 0 : -1;
    }
    tabOpened(name);
};

const bar = document.querySelector(".tabs");
bar.replaceChildren(...tabs.map((panel) => {
    panel.setAttribute("role", "tabpanel");
    panel.setAttribute("aria-labelledby", `tab-${panel.id}`);
    return make("button", { type: "button", role: "tab", id: `tab-${panel.id}`, "aria-controls": panel.id, onclick: () => openTab(panel.dataset.tab) }, panel.dataset.tab);
}));
bar.addEventListener("keydown", (event) => {
    const by = { ArrowLeft: -1, ArrowRight: 1 }[event.key];
    if (!by) return;
    const at = tabs.findIndex((panel) => !panel.hidden);
    const next = tabs[(at + by + tabs.length) % tabs.length];
    openTab(next.dataset.tab);
    find(`tab-${next.id}`).focus();
});

/** `acts`: what keys do, {key: [text, act]}, while no text is typed; with Ctrl, `undo` and `redo`. */
export const shortcutsFor = (acts, undo, redo) => {
    const list = () => find("keys").showModal();
    const shortcuts = { ...acts, "?": ["This list", list] };
    const named = [...Object.entries(shortcuts).map(([key, [text]]) => [key, text]), ["Ctrl+Z", "Undo"], ["Ctrl+Shift+Z", "Redo"], ["Arrow keys", "In the pictures: choose one"]];
    find("keys").append(
        make("h2", { id: "keys-title" }, "Keyboard"),
        make("dl", {}, named.map(([key, text]) => [make("dt", {}, make("kbd", {}, key.length === 1 ? key.toUpperCase() : key)), make("dd", {}, text)])),
        make("p", { class: "hint" }, "Letters count while no text is being typed."),
        button("Close", () => find("keys").close(), { class: "main" }),
    );
    find("help").addEventListener("click", list);
    document.addEventListener("keydown", (event) => {
        const typing = event.target.matches("textarea, input:not([type=checkbox]):not([type=radio]):not([type=range]):not([type=file]), select");
        if (typing || event.altKey || document.querySelector("dialog[open]")) return;
        const key = event.key.length === 1 ? event.key.toLowerCase() : event.key;
        const steps = { z: event.shiftKey ? redo : undo, y: redo };
        const act = event.ctrlKey || event.metaKey ? steps[key] : shortcuts[key]?.[1];
        if (!act) return;
        event.preventDefault();
        act();
    });
};
