// The palette: every expert of a family as controls. It shows a mix, and says how it is changed.
import { button, make, redraw } from "./base.js";
import { state } from "./state.js";

const HINTS = { AND: "all of these", NOT: "the opposite of it", OR: "one at least of those in OR" };
const place = (value) => /^r(\d+)c(\d+)$/.exec(value)?.slice(1).map((part) => Number(part) + 1);
const named = (control, value) => (control.grid ? `row ${place(value)[0]} column ${place(value)[1]}` : value.replaceAll("_", " "));

/** Draws the controls of a family into `root`. `change(mix, quiet)` is called with another mix; quiet where only
    a weight moved, so that what is being dragged stays. */
export const palette = (root, family, mix, most, change) => {
    const picks = mix ? mix.picks : {};
    const set = (name, pick, quiet = false) => {
        const next = structuredClone(mix);
        if (pick) next.picks[name] = pick;
        else delete next.picks[name];
        change(next, quiet);
    };
    if (family.prompts) for (const [name, pick] of Object.entries(picks)) state.prompts.set(name, { name, label: Object.keys(pick.values)[0], values: Object.keys(pick.values), usual: Object.keys(pick.values)[0], base: false, grid: null, weight: family.prompts });
    const controls = [...family.controls, ...(family.prompts ? state.prompts.values() : [])];
    const rows = controls.map((control) => (control.base ? shared(control) : row(control)));
    const inOr = (control) => picks[control.name]?.role === "OR";
    const either = rows.filter((_, i) => inOr(controls[i]));
    const others = rows.filter((_, i) => !inOr(controls[i]));
    const box = either.length ? make("fieldset", { class: "either" }, make("legend", {}, "One at least of"), either) : null;
    const all = make("fieldset", { class: "experts", disabled: !mix }, make("legend", { class: "unseen" }, `Experts of ${family.title}`), others, box, family.prompts ? adding() : null);
    redraw(root, all);

    function adding() {
        const text = make("input", { type: "text", id: "prompt", maxlength: 300, placeholder: "a castle", autocomplete: "off", "aria-label": "A prompt to add", "data-key": "prompt" });
        const add = () => {
            const said = text.value.trim();
            if (said) set(`${family.name}[${JSON.stringify(said)}]`, { role: "AND", together: false, values: { [said]: family.prompts } });
        };
        text.addEventListener("keydown", (event) => {
            if (event.key !== "Enter") return;
            event.preventDefault();
            add();
        });
        return make("div", { class: "expert line" }, text, button("Add prompt", add));
    }

    function shared(control) {
        const box = make("input", {
            type: "checkbox", checked: mix?.base ?? false, "data-key": control.name,
            onchange: (event) => change({ ...structuredClone(mix), base: event.target.checked }),
        });
        const hint = make("small", {}, "what all these pictures share, counted once");
        return make("div", { class: "expert" }, make("label", { class: "on" }, box, make("span", {}, control.label, hint)));
    }

    function row(control) {
        const pick = picks[control.name];
        const many = control.values.length > 2;
        const box = make("input", {
            type: "checkbox", checked: Boolean(pick), "aria-label": control.label, "data-key": control.name,
            onchange: (event) => set(control.name, event.target.checked ? fresh(control) : null),
        });
        const about = control.taught ? "taught by you" : control.values.length === 2 ? `or ${control.values[0].replaceAll("_", " ")}` : "";
        const name = make("span", {}, control.label, about && make("small", {}, about));
        return make(
            "div", { class: `expert${pick ? " is-on" : ""}` },
            make("label", { class: "on" }, box, name),
            pick && roles(control, pick),
            pick && many && choices(control, pick),
            pick && (many && !Object.keys(pick.values).length ? null : weights(control, pick)),
        );
    }

    function fresh(control) {
        return { role: "AND", together: Boolean(control.grid), values: { [control.usual]: control.weight } };
    }

    function chips(legend, names, current, act, key, hints = {}) {
        const made = names.map((name) => make(
            "label", { title: hints[name] },
            make("input", { type: "radio", name: key, value: name, checked: name === current, "data-key": `${key} ${name}`, onchange: () => act(name) }),
            make("span", {}, name),
        ));
        return make("fieldset", { class: "chips" }, make("legend", { class: "unseen" }, legend), made);
    }

    function roles(control, pick) {
        return chips(`${control.label} role`, Object.keys(HINTS), pick.role, (role) => set(control.name, { ...pick, role }), `role ${control.name}`, HINTS);
    }

    function choices(control, pick) {
        const offered = mix.base && family.controls.some((each) => each.base) ? control.values : ["any", ...control.values];
        const toggles = offered.map((value) => button(control.grid && value !== "any" ? "" : value.replaceAll("_", " "), () => {
            const values = { ...pick.values };
            if (value in values) delete values[value];
            else values[value] = Object.values(values)[0] ?? control.weight;
            if (value === "any") for (const other of Object.keys(values)) if (other !== "any") delete values[other];
            if (value !== "any") delete values.any;
            set(control.name, { ...pick, values });
        }, {
            "aria-pressed": String(value in pick.values), "aria-label": value === "any" ? "any" : named(control, value), "data-key": `${control.name} ${value}`,
            class: "value",
        }));
        const style = control.grid ? `--columns: ${control.grid[1]}` : null;
        const group = make("div", { class: control.grid ? "places" : "values", role: "group", "aria-label": `${control.label} value`, style }, toggles);
        const count = Object.keys(pick.values).length;
        const both = count > 1 && pick.role === "AND" && chips(
            `${control.label} together`, ["one of these", "all of these"], pick.together ? "all of these" : "one of these",
            (name) => set(control.name, { ...pick, together: name === "all of these" }), `together ${control.name}`,
        );
        return make("div", { class: "choice" }, group, both);
    }

    function weights(control, pick) {
        const many = control.values.length > 2;
        return make("div", { class: "weights" }, Object.entries(pick.values).map(([value, weight]) => {
            const label = many ? `${control.label} ${value === "any" ? "any" : named(control, value)}` : control.label;
            const move = (number) => {
                const next = Math.min(Math.max(Number(number) || 0, 0), most);
                slider.value = typed.value = next;
                pick.values[value] = next;
                set(control.name, pick, true);
            };
            const slider = make("input", {
                type: "range", min: 0, max: most, step: 0.05, value: weight, "aria-label": `${label} weight`, "data-key": `slide ${control.name} ${value}`,
                oninput: () => move(slider.value),
            });
            const typed = make("input", {
                type: "number", min: 0, max: most, step: "any", value: weight, "aria-label": `number input for ${label} weight`,
                "data-key": `type ${control.name} ${value}`, onchange: () => move(typed.value),
            });
            slider.value = typed.value = weight;
            return make("div", { class: "weight" }, many && make("span", {}, control.grid && value !== "any" ? `${place(value)[0]}, ${place(value)[1]}` : value.replaceAll("_", " ")), slider, typed);
        }));
    }
};

/** A mix at random: one to three experts of a family that is not about a method. */
export const surprise = (families) => {
    const pickOne = (list) => list[Math.floor(Math.random() * list.length)];
    const things = families.filter((family) => !family.method && family.controls.length > 1);
    const family = pickOne(things.length ? things : families);
    const own = family.controls.filter((control) => !control.base).sort(() => Math.random() - 0.5);
    const picks = {};
    for (const control of own.slice(0, 1 + Math.floor(Math.random() * 3))) {
        const many = control.values.length > 2;
        const count = control.grid ? 1 + Math.floor(Math.random() * 4) : 1;
        const values = many ? [...control.values].sort(() => Math.random() - 0.5).slice(0, count) : [control.usual];
        picks[control.name] = {
            role: many || Math.random() < 0.7 ? "AND" : "NOT",
            together: Boolean(control.grid),
            values: Object.fromEntries(values.map((value) => [value, control.weight])),
        };
    }
    return { family: family.name, base: true, picks };
};
