// Looking around a mix: all pictures between two ranges of weights, and the run as an animation.
import { ask, button, find, make, download, stamp } from "./base.js";
import { state } from "./state.js";
import { label } from "./why.js";

const root = find("explore");
const grid = make("div", { id: "grid" });
const film = make("p", { id: "film", role: "status" });
const axes = { across: null, up: null };

const axis = (name, title) => {
    const select = make("select", { id: `axis-${name}`, "aria-label": `${title}: weight of`, onchange: () => range(name) });
    const low = make("input", { type: "number", step: "any", "aria-label": `${title} from` });
    const high = make("input", { type: "number", step: "any", "aria-label": `${title} to` });
    axes[name] = { select, low, high };
    return make("div", { class: "field" }, make("label", { for: `axis-${name}` }, title), select, low, make("span", {}, "to"), high);
};
const range = (name) => {
    const { select, low, high } = axes[name];
    const part = state.parts.find((each) => each.name === select.value);
    if (part) [low.value, high.value] = [Number(part.low.toFixed(2)), Number(part.high.toFixed(2))];
};

/** `draw({across, up})` runs a grid. */
export const explorePanel = (draw) => {
    const cells = make("input", { type: "range", id: "cells", min: 2, max: 8, value: 5 });
    const wanted = () => Object.fromEntries(Object.entries(axes).map(([name, { select, low, high }]) => [
        name, { name: select.value, low: Number(low.value), high: Number(high.value), count: Number(cells.value) },
    ]));
    const save = (kind) => async () => {
        const said = await ask("film", { kind, chain: state.chosen < 0 ? null : state.chosen });
        film.textContent = said.problem ?? `Saved, ${Math.round(said.blob.size / 1000)} kB.`;
        if (said.blob) download(URL.createObjectURL(said.blob), `chain-${stamp()}.${kind}`);
    };
    root.replaceChildren(
        make("p", { class: "hint" }, "A grid of pictures from one noise, over the weights of two experts; below zero an expert is asked for its opposite."),
        axis("across", "Across"), axis("up", "Up"),
        make("div", { class: "field" }, make("label", { for: "cells" }, "Cells a side"), cells),
        make("div", { class: "line" }, button("Draw grid", () => draw(wanted()), { id: "draw" }), button("Save run as GIF", save("gif")), button("Save run as WebP", save("webp"))),
        film, grid,
    );
};

/** Offers the parts whose weights can be moved. */
export const drawAxes = () => {
    const { parts } = state;
    for (const [index, [name, { select }]] of Object.entries(axes).entries()) {
        const before = select.value;
        select.replaceChildren(...parts.map((part) => make("option", { value: part.name }, label(part.name))));
        select.value = parts.some((part) => part.name === before) ? before : (parts[index]?.name ?? "");
        range(name);
    }
    const draw = find("draw");
    draw.disabled = parts.length < 2;
    draw.title = parts.length < 2 ? "A grid needs two experts in the mix" : "";
};

export const showGrid = (message) => grid.replaceChildren(make(
    "figure", { class: "grid" }, make("img", { src: message.picture, alt: "Grid of samples over two weights" }),
    make("figcaption", {}, `step ${message.step} of ${message.of}`, message.done ? make("a", { href: message.picture, download: `grid-${stamp()}.png` }, "Save grid") : ""),
));
