//! The timeline of one micro-batch and one update as SVG: stages as lanes, ops as bars below them, in lines like a text.

use std::fmt::Write as _;
use std::time::Duration;

use super::StepProfile;
use super::table::{digits, milliseconds, rate, share};
use super::trace::span_name;
use crate::profile::Span;
use crate::train::svg::{Axis, escape};

const WIDTH: f64 = 1200.0;
const LEFT: f64 = 12.0;
const RIGHT: f64 = 12.0;
const TOP: f64 = 44.0;
/// Of a stage's lane, of the ops' lane, and of the axis below.
const LANE: f64 = 17.0;
const OPS: f64 = 34.0;
const AXIS: f64 = 34.0;
/// Of a line and a column of the legend.
const ENTRY: [f64; 2] = [195.0, 19.0];
/// A line has about this many ops, unless that makes too many lines.
const OPS_OF_LINE: usize = 120;
const MOST_LINES: usize = 6;
/// About the width of a letter.
const LETTER: f64 = 6.1;

/// A colour for each op, that is told from its neighbours in the step on white and on black.
const COLOURS: [(&str, &str); 20] = [
    ("linear", "#3f7fd6"),
    ("attention", "#e08534"),
    ("layer_norm", "#35a877"),
    ("low_freq_target", "#9060cc"),
    ("masked_mse_loss", "#d64a62"),
    ("adamw", "#b3961c"),
    ("input", "#22a6b8"),
    ("resize", "#7ac7b4"),
    ("patch_embed", "#83b2f0"),
    ("add_positions", "#cf7fbd"),
    ("restore_tokens", "#8f6f4e"),
    ("gather_tokens", "#6d9e36"),
    ("grad_norm", "#dcbc4c"),
    ("random_masking", "#56788c"),
    ("gelu", "#a5cc5c"),
    ("cast", "#b98d70"),
    ("upload", "#7d8894"),
    ("read", "#7d8894"),
    ("copy", "#a3adb8"),
    ("clear", "#bcc4cc"),
];
/// What the time between ops is called.
const IDLE: &str = "no op";

/// Colours of the page, light and dark. The names begin with `steps`, as a report has other pictures.
const STYLE: &str = "\
.steps { --ink: #1d2127; --soft: #5d6672; --lane: #e4e8ed; --back: #ffffff; --idle: #f3b4ac; }\n\
@media (prefers-color-scheme: dark) {\n\
.steps { --ink: #e6e8eb; --soft: #9aa4b0; --lane: #313942; --back: #1c2025; --idle: #7a3f38; }\n\
}\n\
.steps { display: block; width: 100%; height: auto; background: var(--back); }\n\
.steps text { font: 11px system-ui, \"DejaVu Sans\", sans-serif; fill: var(--soft); }\n\
.steps .steps-title { font-size: 14px; font-weight: 600; fill: var(--ink); }\n\
.steps .steps-in { fill: var(--ink); }\n\
.steps .steps-on { fill: #ffffff; }\n\
.steps .steps-tick { text-anchor: middle; }\n\
.steps .steps-stage { fill: var(--lane); }\n\
.steps .steps-idle { fill: var(--idle); }\n\
.steps rect { stroke: var(--back); stroke-width: 0.4; }\n\
.steps line { stroke: var(--soft); }\n";

impl StepProfile {
    /// The timeline as an `<svg>` element, which is a file by itself too.
    #[must_use]
    pub fn svg(&self) -> String {
        let spans: Vec<Span> = self.profile.spans().collect();
        let ops = spans.iter().filter(|span| span.cost.is_some()).count();
        let stages = spans.iter().filter(|span| span.cost.is_none());
        let lanes = stages.map(|span| span.depth + 1).max().unwrap_or(0);
        let lines = ops.div_ceil(OPS_OF_LINE).clamp(1, MOST_LINES);
        let line_height = LANE * lanes as f64 + OPS + AXIS;
        let legend = self.legend();
        let columns = ((WIDTH - LEFT - RIGHT) / ENTRY[0]) as usize;
        let legend_top = TOP + line_height * lines as f64;
        let height = legend_top + ENTRY[1] * legend.len().div_ceil(columns) as f64 + 8.0;
        let mut svg = format!(
            "<svg xmlns=\"http://www.w3.org/2000/svg\" class=\"steps\" viewBox=\"0 0 {WIDTH} {height}\" role=\"img\" \
             aria-label=\"Timeline of a training step\">\n<style>\n{STYLE}</style>\n\
             <text class=\"steps-title\" x=\"{LEFT}\" y=\"18\">Where the time of a step goes</text>\n\
             <text x=\"{LEFT}\" y=\"35\">{}</text>\n",
            escape(&self.summary())
        );
        for line in 0..lines {
            let at = |line: usize| self.profile.took().mul_f64(line as f64 / lines as f64);
            let drawn = Line {
                begin: at(line),
                end: at(line + 1),
                top: TOP + line_height * line as f64,
                lanes,
            };
            drawn.draw(&mut svg, &spans);
        }
        for (entry, (op, part)) in legend.iter().enumerate() {
            let x = LEFT + ENTRY[0] * (entry % columns) as f64;
            let y = legend_top + ENTRY[1] * (entry / columns) as f64;
            let _ = writeln!(
                svg,
                "<rect {} x=\"{x}\" y=\"{y}\" width=\"12\" height=\"12\"/>\
                 <text class=\"steps-in\" x=\"{:.0}\" y=\"{:.0}\">{op} {:.1} %</text>",
                paint(op),
                x + 18.0,
                y + 10.0,
                100.0 * part
            );
        }
        svg.push_str("</svg>\n");
        svg
    }

    /// Ops with their share of a step, the largest first, and at the end the time in none.
    fn legend(&self) -> Vec<(&'static str, f64)> {
        let mut shares: Vec<(&str, f64)> = Vec::new();
        for row in self.rows() {
            let part = share(row.took, self.took());
            match shares.iter_mut().find(|(op, _)| *op == row.op) {
                Some((_, sum)) => *sum += part,
                None => shares.push((row.op, part)),
            }
        }
        shares.sort_by(|a, b| b.1.total_cmp(&a.1));
        shares.push((IDLE, share(self.idle(), self.took())));
        shares
    }
}

/// A part of the timeline.
struct Line {
    begin: Duration,
    end: Duration,
    top: f64,
    lanes: usize,
}

impl Line {
    fn draw(&self, svg: &mut String, spans: &[Span]) {
        let range = (milliseconds(self.begin), milliseconds(self.end));
        let axis = Axis::new(range, LEFT, WIDTH - RIGHT, false, 0.0);
        let [from, to] = [self.begin, self.end].map(|time| axis.place(milliseconds(time)));
        let ops_top = self.top + LANE * self.lanes as f64;
        // What no bar covers is time in no op.
        let _ = writeln!(
            svg,
            "<rect class=\"steps-idle\" x=\"{from:.2}\" y=\"{ops_top:.1}\" width=\"{:.2}\" height=\"{OPS}\"/>",
            to - from
        );
        for span in spans.iter().filter(|span| span.begin < self.end && span.end > self.begin) {
            let [left, right] = [span.begin.max(self.begin), span.end.min(self.end)]
                .map(|time| axis.place(milliseconds(time)));
            self.bar(svg, span, left, right - left);
        }
        let foot = ops_top + OPS;
        for (value, label) in axis.ticks(8) {
            let x = axis.place(value);
            let _ = writeln!(
                svg,
                "<line x1=\"{x:.1}\" y1=\"{foot:.1}\" x2=\"{x:.1}\" y2=\"{:.1}\"/>\
                 <text class=\"steps-tick\" x=\"{:.1}\" y=\"{:.1}\">{label} ms</text>",
                foot + 4.0,
                x.clamp(LEFT + 16.0, WIDTH - RIGHT - 16.0),
                foot + 15.0
            );
        }
    }

    /// A span, `width` wide, with its name where there is room, and its figures for the pointer.
    fn bar(&self, svg: &mut String, span: &Span, left: f64, width: f64) {
        let name = span_name(span);
        let took = format!("{} ms", digits(milliseconds(span.took())));
        let (op, _) = span.name.split_once("::").unwrap_or((span.name, ""));
        let (lane, height, class, paint, words) = match span.cost {
            Some(_) => (self.lanes, OPS, "steps-on", paint(op), vec![op.to_owned()]),
            None => {
                let number = span.index.map(|index| index.to_string()).unwrap_or_default();
                let words = vec![format!("{name}  {took}"), name.clone(), number];
                (span.depth, LANE, "steps-in", "class=\"steps-stage\"".into(), words)
            }
        };
        let top = self.top + LANE * lane as f64;
        let _ = writeln!(
            svg,
            "<rect {paint} x=\"{left:.2}\" y=\"{top:.1}\" width=\"{width:.2}\" height=\"{height}\">\
             <title>{name}: {took}{}</title></rect>",
            rates(span)
        );
        let fits = |word: &&String| {
            !word.is_empty() && LETTER * word.chars().count() as f64 + 6.0 <= width
        };
        if let Some(word) = words.iter().find(fits) {
            let _ = writeln!(
                svg,
                "<text class=\"{class}\" x=\"{:.1}\" y=\"{:.1}\">{word}</text>",
                left + 4.0,
                top + height / 2.0 + 4.0
            );
        }
    }
}

/// What an op moved and computed in a second.
fn rates(span: &Span) -> String {
    let cost = span.cost.unwrap_or_default();
    [(cost.bytes, 1e9, "GB/s"), (cost.flops, 1e12, "TFLOP/s")]
        .into_iter()
        .filter(|(amount, ..)| *amount > 0)
        .map(|(amount, unit, name)| format!(", {} {name}", rate(amount, span.took(), unit)))
        .collect()
}

/// The attribute that gives an op's bar its colour; one that is not known is grey.
fn paint(op: &str) -> String {
    if op == IDLE {
        return "class=\"steps-idle\"".into();
    }
    match COLOURS.iter().find(|(known, _)| *known == op) {
        Some((_, colour)) => format!("fill=\"{colour}\""),
        None => "fill=\"#888888\"".into(),
    }
}
