// One zooming slide with a map over it. The map is drawn on a canvas of its own, from the same coordinates as the slide.

const BAR_SHARE = 0.2;
const MARGIN_PX = 12;

// OpenSeadragon is installed apart from crcjax, so that it may be missing.
let loading = null;

export function loadLibrary() {
  loading ??= new Promise((resolve, reject) => {
    const script = document.createElement("script");
    script.src = "/openseadragon.js";
    script.addEventListener("load", () => resolve(window.OpenSeadragon));
    script.addEventListener("error", () => {
      loading = null;
      script.remove();
      reject(new Error("The zooming viewer is not installed on the server: crcjax install-viewer."));
    });
    document.head.append(script);
  });
  return loading;
}

export class SlideViewer {
  // `image` is the answer of /v1/slides/ID/image; `label` names the slide for people.
  constructor(library, container, slideId, image, label) {
    this.library = library;
    this.image = image;
    this.map = null;
    this.marked = null;
    this.opacity = 0.5;
    this.viewer = new library.Viewer({
      element: container,
      tileSources: new library.DziTileSource(
        image.width, image.height, image.tile_px, 0, `/v1/slides/${slideId}/image_files/`, "jpeg",
      ),
      drawer: "canvas",
      showNavigationControl: false,
      showNavigator: true,
      navigatorPosition: "TOP_RIGHT",
      animationTime: matchMedia("(prefers-reduced-motion: reduce)").matches ? 0 : 0.4,
      maxZoomPixelRatio: 4,
      visibilityRatio: 0.3,
      gestureSettingsMouse: { clickToZoom: false, dblClickToZoom: true },
    });
    this.viewer.canvas.setAttribute("role", "application");
    this.viewer.canvas.setAttribute("aria-label", `${label}: arrow keys move, plus and minus zoom, 0 shows the whole slide`);
    // The map is not drawn turned or mirrored.
    this.viewer.addHandler("canvas-key", (event) => {
      if (["r", "R", "f"].includes(event.originalEvent.key)) {
        event.preventDefaultAction = true;
      }
    });
    this.canvas = document.createElement("canvas");
    this.canvas.className = "overlay";
    this.canvas.setAttribute("aria-hidden", "true");
    // Above the slide, and below the small picture of the whole one.
    this.viewer.canvas.append(this.canvas);
    for (const name of ["update-viewport", "resize", "open"]) {
      this.viewer.addHandler(name, () => this.draw());
    }
  }

  // `picture` is an image of the map, `box` its place in level-0 px.
  setMap(picture, box) {
    this.map = picture && { picture, box };
    this.draw();
  }

  setOpacity(opacity) {
    this.opacity = opacity;
    this.draw();
  }

  zoomBy(factor) {
    this.viewer.viewport.zoomBy(factor);
    this.viewer.viewport.applyConstraints();
  }

  home() {
    this.viewer.viewport.goHome();
  }

  // Shows a square of level-0 px with its surroundings, and marks it.
  goTo({ x, y, side }) {
    this.marked = [x, y, side, side];
    const around = 1.5 * side;
    const box = this.viewer.viewport.imageToViewportRectangle(x - around, y - around, side + 2 * around, side + 2 * around);
    this.viewer.viewport.fitBounds(box);
    this.draw();
  }

  // The rectangle of the window in which level-0 px are shown.
  place(box) {
    const viewport = this.viewer.viewport;
    return viewport.viewportToViewerElementRectangle(viewport.imageToViewportRectangle(...box));
  }

  draw() {
    if (!this.viewer?.isOpen()) {
      return;
    }
    const ratio = window.devicePixelRatio || 1;
    const { clientWidth: width, clientHeight: height } = this.viewer.container;
    if (this.canvas.width !== Math.round(width * ratio) || this.canvas.height !== Math.round(height * ratio)) {
      this.canvas.width = Math.round(width * ratio);
      this.canvas.height = Math.round(height * ratio);
    }
    const context = this.canvas.getContext("2d");
    context.setTransform(ratio, 0, 0, ratio, 0, 0);
    context.clearRect(0, 0, width, height);
    if (this.map) {
      const at = this.place(this.map.box);
      context.globalAlpha = this.opacity;
      context.imageSmoothingEnabled = false;
      context.drawImage(this.map.picture, at.x, at.y, at.width, at.height);
      context.globalAlpha = 1;
    }
    if (this.marked) {
      const at = this.place(this.marked);
      for (const [colour, line] of [["#ffffff", 5], ["#000000", 2]]) {
        context.strokeStyle = colour;
        context.lineWidth = line;
        context.strokeRect(at.x, at.y, at.width, at.height);
      }
    }
    this.drawScaleBar(context, width, height);
  }

  drawScaleBar(context, width, height) {
    const pxPerUm = this.place([0, 0, 1, 1]).width / this.image.mpp;
    const longest = (BAR_SHARE * width) / pxPerUm;
    const power = 10 ** Math.floor(Math.log10(longest));
    const um = Math.max(...[1, 2, 5].map((step) => step * power).filter((length) => length <= longest));
    const text = um >= 1000 ? `${um / 1000} mm` : `${um} µm`;
    context.font = "14px system-ui, sans-serif";
    const bar = um * pxPerUm;
    const box = Math.max(bar, context.measureText(text).width) + 16;
    const top = height - MARGIN_PX - 34;
    context.fillStyle = "rgba(255, 255, 255, 0.85)";
    context.fillRect(MARGIN_PX, top, box, 34);
    context.fillStyle = "#000000";
    context.fillText(text, MARGIN_PX + 8, top + 16);
    context.fillRect(MARGIN_PX + 8, top + 22, bar, 4);
  }

  close() {
    this.viewer.destroy();
    this.viewer = null;
  }
}
