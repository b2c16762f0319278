"""How the page looks: its colours, fonts that need no download, and the styles of what `view` writes."""

from __future__ import annotations

from typing import Any

FONTS = ("ui-sans-serif", "system-ui", "-apple-system", "Segoe UI", "Roboto", "Noto Sans", "DejaVu Sans", "sans-serif")
MONO = ("ui-monospace", "SFMono-Regular", "Consolas", "DejaVu Sans Mono", "monospace")

CSS = """
.gradio-container { max-width: none !important; }
.gradio-container main { width: 100% !important; max-width: 1440px !important; margin: 0 auto !important; }
.studio-controls .head { flex-wrap: wrap; } .reset-button { display: none !important; }
.studio-head { display: flex; flex-wrap: wrap; align-items: baseline; gap: 2px 14px; padding: 2px 0 0 4px; }
.studio-head b { font-size: 1.35rem; letter-spacing: -0.01em; }
.studio-head span { color: var(--body-text-color-subdued); font-size: .88rem; }
.studio-empty { display: flex; align-items: center; justify-content: center; min-height: 420px; text-align: center;
  border: 2px dashed var(--border-color-primary); border-radius: 12px; color: var(--body-text-color-subdued);
  padding: 24px; line-height: 1.6; }
.studio-preview { display: flex; justify-content: center; background: var(--background-fill-secondary);
  border: 1px solid var(--border-color-primary); border-radius: 12px; padding: 10px; margin: 8px 0; }
.studio-preview img { width: 100%; max-height: 560px; object-fit: contain; }
.studio-job { border: 1px solid var(--border-color-primary); border-radius: 12px; padding: 12px 14px; margin: 6px 0;
  background: var(--block-background-fill); }
.studio-title { font-weight: 600; overflow: hidden; text-overflow: ellipsis; white-space: nowrap; }
.studio-line { color: var(--body-text-color-subdued); font-size: .9rem; margin-top: 4px;
  font-variant-numeric: tabular-nums; }
.studio-bar { height: 8px; border-radius: 4px; background: var(--border-color-primary); overflow: hidden;
  margin: 9px 0 5px; }
.studio-bar div { height: 100%; background: var(--color-accent); transition: width .5s linear; }
.studio-failed { border-color: #d9534f; } .studio-failed .studio-line { color: #c9302c; }
.dark .studio-failed .studio-line { color: #ff8a80; }
.studio-queue { font-size: .9rem; color: var(--body-text-color-subdued); margin: 8px 4px; }
.studio-queue ol { margin: 4px 0 0 20px; list-style: decimal; }
.studio-curve { width: 100%; border: 1px solid var(--border-color-primary); border-radius: 12px; margin: 6px 0;
  background: var(--block-background-fill); }
.studio-curve line { stroke: var(--border-color-primary); }
.studio-curve polyline { fill: none; stroke: var(--color-accent); }
.studio-curve .raw { opacity: .25; stroke-width: 1; } .studio-curve .smooth { stroke-width: 2.2; }
.studio-curve text { fill: var(--body-text-color-subdued); font-size: 11px; }
.studio-samples div { display: flex; align-items: center; gap: 12px; margin: 6px 0; }
.studio-samples span { width: 64px; text-align: right; flex: none; color: var(--body-text-color-subdued);
  font-size: .9rem; font-variant-numeric: tabular-nums; }
.studio-samples img { flex: 1; min-width: 0; border-radius: 6px; }
.studio-results .thumbnail-item img { object-fit: cover; }
.studio-small .studio-preview img, .studio-small .studio-results img, .studio-small .studio-grid img,
.studio-small .studio-samples img { image-rendering: pixelated; }
.studio-small .studio-source img { width: 100%; height: 100%; object-fit: contain; image-rendering: pixelated; }
#brush { position: absolute; touch-action: none; cursor: crosshair; opacity: .6; z-index: 5; }
.studio-tools { display: flex; gap: 14px; align-items: center; font-size: .9rem; padding: 2px 4px;
  color: var(--body-text-color-subdued); }
.studio-tools label { display: flex; gap: 8px; align-items: center; }
.studio-tools button { font-size: .85rem !important; font-weight: 400 !important;
  border: 1px solid var(--border-color-primary); border-radius: 6px; padding: 2px 10px; }
#inpaint-image img { width: 100%; height: 100%; object-fit: contain; }
.studio-go { min-height: 46px; }
.studio-hint { min-height: 120px; }
.studio-turn { align-items: center; } .studio-turn .studio-line { text-align: center; margin: 0; }
#train-photos .grid-wrap { padding-top: 34px; }
.studio-settings textarea { font-family: var(--font-mono); font-size: .8rem; }
footer { display: none !important; }
"""


def theme() -> Any:
    """Gradio's plain theme in the page's colours."""
    import gradio as gr

    return gr.themes.Default(
        primary_hue=gr.themes.colors.indigo,
        secondary_hue=gr.themes.colors.indigo,
        neutral_hue=gr.themes.colors.slate,
        radius_size=gr.themes.sizes.radius_lg,
        font=FONTS,
        font_mono=MONO,
    )
