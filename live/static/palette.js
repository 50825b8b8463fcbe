// Colours of noise levels and of the grid, for both themes.

const STOPS = {
  dark: [[45, 212, 191], [96, 165, 250], [167, 139, 250], [244, 114, 182], [251, 146, 60]],
  light: [[16, 167, 148], [63, 134, 234], [138, 99, 232], [219, 74, 148], [234, 122, 31]],
};
export const INK = {
  dark: { back: "#0d1018", text: "#eceff6", muted: "#8c95aa", empty: "rgba(255,255,255,.055)", tile: "#161a25" },
  light: { back: "#ffffff", text: "#12151c", muted: "#667085", empty: "rgba(18,24,40,.07)", tile: "#eef0f5" },
};

/** Return the colour of a noise level as [r, g, b]: teal for clean, orange for pure noise. */
export function noiseColor(sigma, theme) {
  const stops = STOPS[theme];
  const x = Math.min(0.9999, Math.max(0, sigma) ** 2.4) * (stops.length - 1); // most steps are at high levels
  const low = Math.floor(x);
  return stops[low].map((value, i) => Math.round(value + (stops[low + 1][i] - value) * (x - low)));
}

export const rgba = (color, alpha) => `rgba(${color[0]},${color[1]},${color[2]},${alpha})`;

const glows = new Map();

/** Return a soft spot of a colour, drawn once per colour. */
export function glow(color) {
  const key = color.join();
  if (!glows.has(key)) {
    const spot = new OffscreenCanvas(128, 128), c = spot.getContext("2d");
    const fill = c.createRadialGradient(64, 64, 8, 64, 64, 64);
    fill.addColorStop(0, rgba(color, 0.9));
    fill.addColorStop(0.55, rgba(color, 0.32));
    fill.addColorStop(1, rgba(color, 0));
    c.fillStyle = fill;
    c.fillRect(0, 0, 128, 128);
    glows.set(key, spot);
  }
  return glows.get(key);
}
