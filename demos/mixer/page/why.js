// Why the pictures look as they do: what each expert says, and where it pushes the chosen picture.
import { ask, button, find, make } from "./base.js";
import { crop } from "./picture.js";
import { state } from "./state.js";

const root = find("why");
const table = make("div", { id: "terms" });
const heat = make("div", { id: "heat" }, make("p", { class: "hint" }, "Choose a picture to see where each expert pushes it."));
const strip = make("div", { id: "alone" });

export const whyPanel = (alone) => {
    root.replaceChildren(table, heat, button("Each expert alone, from the same noise", alone, { id: "alone-button" }), strip);
};

/** What people call a part of a recipe. */
export const label = (name) => {
    const prompt = /^(~?)\w+\[(".*")\]$/s.exec(name);
    const text = prompt ? prompt[1] + JSON.parse(prompt[2]) : name.replaceAll(/\w+\//g, "").replaceAll("_", " ").replaceAll("[", " ").replaceAll("]", "");
    return text.startsWith("~") ? `not ${text.slice(1)}` : text;
};

const spark = (values) => {
    const known = values.filter(Number.isFinite);
    if (known.length < 2) return "";
    const [low, high] = [Math.min(...known), Math.max(...known)];
    const points = known.map((value, i) => `${((110 * i) / (known.length - 1)).toFixed(1)},${(2 + (20 * (high - value)) / (high - low || 1)).toFixed(1)}`);
    const made = document.createElementNS("http://www.w3.org/2000/svg", "svg");
    made.setAttribute("viewBox", "0 0 110 24");
    made.setAttribute("class", "spark");
    made.setAttribute("aria-hidden", "true");
    const drawn = document.createElementNS("http://www.w3.org/2000/svg", "polyline");
    drawn.setAttribute("points", points.join(" "));
    made.append(drawn);
    return made;
};

/** What the parts of a run say now. */
export const explain = (message) => {
    if (!message.terms) return;
    const rows = message.terms.map((term) => {
        const energy = parseFloat(term.energy.replaceAll(",", "")); // not a number where there is none
        const history = (state.along[term.name] = [...(state.along[term.name] ?? []), energy].slice(-200));
        const percent = term.probability === null ? null : Math.round(100 * term.probability);
        return make(
            "tr", {},
            make("th", { scope: "row", title: term.name }, term.group ? make("small", {}, "or ") : "", label(term.name)),
            make("td", {}, String(Number(term.weight.toFixed(2)))),
            make("td", {}, percent === null ? "" : make("meter", { min: 0, max: 100, value: percent, "aria-label": `${label(term.name)} satisfied` }), percent === null ? "" : ` ${percent} %`),
            make("td", { class: "nats" }, term.energy),
            make("td", { class: "nats" }, spark(history)),
        );
    });
    const heads = [
        ["Expert", ""], ["Weight", "How strongly it is asked for: 1 is Bayes' rule, more is a taste"],
        ["Satisfied", "How sure the expert is that the pictures have it"], ["Energy", "In nats: low is likely"], ["Along the run", ""],
    ];
    const head = heads.map(([text, title], i) => make("th", { scope: "col", title, class: i > 2 ? "nats" : null }, text));
    const noise = message.level ? make("p", { class: "hint" }, `Energies while playing are seen through noise of ${message.level}: compare them with each other, not with those of Sample.`) : "";
    table.replaceChildren(make("table", { class: "terms" }, make("caption", { class: "unseen" }, "What each expert says"), make("thead", {}, make("tr", {}, head)), make("tbody", {}, rows)), noise);
};

export const lookAt = async () => {
    const [index, picture, { recipe }] = [state.chosen, crop(state.chosen), state.shown];
    if (!picture || !recipe) return;
    const said = await ask("heat", { picture, recipe });
    if (said.problem) return heat.replaceChildren(make("p", { class: "hint" }, said.problem));
    heat.replaceChildren(
        make("p", {}, `Where each expert pushes picture ${index + 1}, seen through noise: `, make("b", { class: "brighter" }, "red"), " brighter, ", make("b", { class: "darker" }, "blue"), " darker."),
        make("div", { class: "row" }, said.pushes.map((push) => make(
            "figure", {}, make("img", { src: push.picture, alt: `Where ${label(push.name)} pushes` }),
            make("figcaption", {}, `${label(push.name)}, ${Math.round(100 * push.share)} %`),
        ))),
    );
};

export const showAlone = (pictures) => strip.replaceChildren(make("div", { class: "row" }, pictures.map((each) => make(
    "figure", {}, make("img", { src: each.picture, alt: each.label, class: "pixels" }), make("figcaption", {}, each.label),
))));
