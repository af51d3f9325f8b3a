"""How the report looks. Colours are variables with a light and a dark value; pictures use the same ones."""

CSS = """
:root {
  color-scheme: light dark;
  --page: #f6f7f9; --card: #ffffff; --ink: #5b6472; --strong: #171b22; --line: #e3e6eb; --soft: #eef0f4;
  --series-1: #2f6fde; --series-2: #e07a1f; --series-3: #12967a; --series-4: #8a5cd6; --series-5: #c9467f;
  --good: #15803d; --warn: #b45309; --bad: #d02b2b; --plain: #6b7484;
}
@media (prefers-color-scheme: dark) {
  :root {
    --page: #0f1217; --card: #181c23; --ink: #9aa4b2; --strong: #eef1f5; --line: #2a303a; --soft: #222832;
    --series-1: #6ea2ff; --series-2: #f5a35c; --series-3: #3fc6a5; --series-4: #b594f5; --series-5: #f083b2;
    --good: #4ade80; --warn: #fbbf24; --bad: #ff7b72; --plain: #8b95a5;
  }
}
* { box-sizing: border-box; }
body { margin: 0 auto; padding: 32px 20px 64px; max-width: 1120px; background: var(--page); color: var(--ink);
  font: 15px/1.5 system-ui, -apple-system, "Segoe UI", Roboto, "Helvetica Neue", sans-serif; }
h1, h2, h3, strong, b, th, td { color: var(--strong); }
h1 { margin: 0; font-size: 28px; letter-spacing: -0.01em; overflow-wrap: anywhere; }
h2 { margin: 0 0 4px; font-size: 18px; }
h3 { margin: 0 0 6px; font-size: 13px; font-weight: 600; }
p { margin: 0 0 12px; }
header { margin-bottom: 20px; }
section { margin: 0 0 20px; padding: 20px 22px; background: var(--card); border: 1px solid var(--line);
  border-radius: 12px; }
.subtitle { margin: 2px 0 18px; }
.note { font-size: 13.5px; }
.badge { display: inline-block; padding: 1px 9px; border-radius: 99px; font-size: 12px; font-weight: 600;
  line-height: 1.6; vertical-align: middle; letter-spacing: 0; color: var(--tone);
  background: color-mix(in srgb, var(--tone) 14%, transparent); }
.good { --tone: var(--good); } .warn { --tone: var(--warn); } .bad { --tone: var(--bad); }
.plain { --tone: var(--plain); }
.alert { margin: 0 0 16px; padding: 10px 14px; border-radius: 8px; border-left: 3px solid var(--tone);
  background: color-mix(in srgb, var(--tone) 10%, var(--card)); color: var(--strong); font-size: 14px;
  overflow-wrap: anywhere; }
ul.alert { padding-left: 32px; }
.tiles { display: grid; grid-template-columns: repeat(auto-fit, minmax(158px, 1fr)); gap: 12px; margin-bottom: 16px; }
.tile { padding: 12px 14px; background: var(--card); border: 1px solid var(--line); border-radius: 12px;
  display: flex; flex-direction: column; }
.tile span, .tile small { font-size: 12.5px; }
.tile strong { font-size: 25px; font-weight: 650; line-height: 1.3; letter-spacing: -0.02em;
  font-variant-numeric: tabular-nums; }
.charts { display: grid; grid-template-columns: repeat(auto-fit, minmax(min(100%, 430px), 1fr)); gap: 22px 28px; }
figure { margin: 0; min-width: 0; }
svg.schedule { width: 100%; height: auto; background: white; border-radius: 6px; }
figure svg { display: block; max-width: 100%; height: auto; }
.chart svg { width: 100%; }
.chart svg text { font: 10.5px system-ui, -apple-system, "Segoe UI", Roboto, sans-serif;
  font-variant-numeric: tabular-nums; }
.heat { margin-top: 14px; } .heat figcaption { font-size: 14px; }
.heat svg text { font: 10.5px system-ui, -apple-system, "Segoe UI", Roboto, sans-serif; }
.chart figcaption { display: flex; flex-wrap: wrap; justify-content: space-between; gap: 0 16px; font-size: 14px; }
.keys { display: flex; flex-wrap: wrap; gap: 2px 16px; margin: 0; font-size: 13px; }
.key { display: inline-block; width: 9px; height: 9px; margin-right: 6px; border-radius: 3px; }
.series-1 { background: var(--series-1); } .series-2 { background: var(--series-2); }
.series-3 { background: var(--series-3); } .series-4 { background: var(--series-4); }
.series-5 { background: var(--series-5); }
.bar { display: flex; gap: 2px; flex: 1; height: 26px; margin: 8px 0; min-width: 0; }
.bar i { min-width: 2px; border-radius: 3px; }
.barrow { display: flex; align-items: center; gap: 12px; }
.barrow .axis { width: 110px; color: var(--strong); font-size: 14px; }
.barrow .amount { width: 84px; text-align: right; color: var(--strong); font-variant-numeric: tabular-nums;
  font-size: 14px; }
.barrow .bar { height: 18px; margin: 5px 0; }
.facts td:first-child { width: 40%; }
.columns { display: grid; grid-template-columns: repeat(auto-fit, minmax(min(100%, 400px), 1fr)); gap: 16px 28px;
  margin-top: 16px; align-items: start; }
.scroll { overflow-x: auto; }
.scroll table { width: 100%; border-collapse: collapse; font-size: 13.5px; }
.scroll th { padding: 6px 18px 6px 0; text-align: left; font-weight: 600; border-bottom: 1px solid var(--line);
  white-space: nowrap; color: var(--ink); }
.scroll td { padding: 5px 18px 5px 0; border-bottom: 1px solid var(--soft); white-space: nowrap; }
.scroll td small { color: var(--ink); }
.scroll tr:last-child td { border-bottom: 0; }
.scroll th:last-child, .scroll td:last-child { padding-right: 0; }
.scroll .number { text-align: right; font-variant-numeric: tabular-nums; }
.breakable { white-space: normal; overflow-wrap: anywhere; }
code, pre { font-size: 12.5px;
  font-family: ui-monospace, SFMono-Regular, Menlo, Consolas, "Liberation Mono", monospace; }
.chip { display: inline-block; margin-right: 4px; padding: 0 7px; border-radius: 5px; font-size: 12px;
  color: var(--series-1); background: color-mix(in srgb, var(--series-1) 13%, transparent); }
.chip.none { color: var(--ink); background: var(--soft); }
.panels { display: flex; flex-wrap: wrap; gap: 20px 28px; }
.panel { max-width: 100%; overflow-x: auto; }
.panel table { border-spacing: 5px; border-collapse: separate; }
.panel th { font-size: 12px; font-weight: 500; color: var(--ink); padding: 0 6px; white-space: nowrap; }
.panel tr > td:not(:first-child), .panel tr > th + td { min-width: 84px; padding: 9px 8px; text-align: center;
  border-radius: 8px; line-height: 1.25; background: color-mix(in srgb, var(--tint) 16%, var(--card));
  border: 1px solid color-mix(in srgb, var(--tint) 40%, transparent); }
.panel td b { display: block; font-size: 16px; }
.panel td small { font-size: 11px; color: var(--ink); white-space: nowrap; }
.tint-0 { --tint: var(--series-1); } .tint-1 { --tint: var(--series-2); } .tint-2 { --tint: var(--series-3); }
.tint-3 { --tint: var(--series-4); } .tint-4 { --tint: var(--series-5); } .tint-5 { --tint: var(--plain); }
.boxes { display: flex; flex-wrap: wrap; gap: 24px 36px; align-items: flex-end; margin: 10px 0 20px; }
.boxes figcaption { display: flex; flex-direction: column; margin-top: 8px; font-size: 12.5px; }
.boxes svg line { stroke: var(--series-1); stroke-width: 1.2; }
.boxes svg .outline { fill: none; stroke: var(--series-1); stroke-width: 1.6; }
.boxes svg .own { fill: color-mix(in srgb, var(--series-1) 34%, transparent); }
.strip { position: relative; height: 26px; margin: 4px 6px 14px; }
.strip::before { content: ""; position: absolute; inset: 12px -6px auto; height: 2px; background: var(--line); }
.strip i { position: absolute; top: 5px; width: 4px; height: 16px; margin-left: -2px; border-radius: 2px;
  background: var(--tone); opacity: 0.85; }
.events { max-height: 440px; overflow-y: auto; margin: 0; padding: 0; list-style: none; }
.events li { display: grid; grid-template-columns: 72px 92px 1fr; gap: 4px 10px; align-items: baseline; padding: 5px 0;
  border-bottom: 1px solid var(--soft); font-size: 13.5px; }
.events li:last-child { border-bottom: 0; }
.events .badge { justify-self: start; }
time { font-variant-numeric: tabular-nums; }
.fields { display: flex; flex-wrap: wrap; gap: 0 16px; color: var(--strong); overflow-wrap: anywhere; min-width: 0; }
.fields span { min-width: 0; }
.fields em { font-style: normal; color: var(--ink); }
.sample, .config { margin: 8px 0; padding: 12px 14px; background: var(--soft); border-radius: 8px; color: var(--strong);
  white-space: pre-wrap; overflow-wrap: anywhere; }
.sample { max-height: 320px; overflow-y: auto; }
.sample b { color: var(--series-1); }
details { margin-top: 12px; }
summary { cursor: pointer; color: var(--strong); font-size: 14px; }
footer { font-size: 12.5px; }
@media (max-width: 560px) {
  body { padding: 20px 12px 40px; }
  section { padding: 16px 14px; }
  .tiles { grid-template-columns: repeat(2, 1fr); }
  .events li { grid-template-columns: 64px 1fr; }
  .events .fields { grid-column: 1 / -1; }
  .barrow .axis { width: 74px; }
}
@media print { body { background: none; } .events, .sample { max-height: none; } section { break-inside: avoid; } }
"""
