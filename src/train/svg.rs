//! Line charts as inline SVG. Colours come from the page's style sheet, so that a chart is light or dark with it.

use std::fmt::Write as _;

/// One curve of a chart.
pub(super) struct Curve<'a> {
    /// What the legend calls it.
    pub(super) name: &'a str,
    /// Class of the style sheet: `main`, `faint`, `second`, `third`.
    pub(super) class: &'a str,
    /// Step and value; what is not finite is left out.
    pub(super) points: Vec<(f64, f64)>,
}

/// A chart over steps.
pub(super) struct Chart<'a> {
    pub(super) title: &'a str,
    pub(super) unit: &'a str,
    /// Logarithmic values; what is not positive is left out.
    pub(super) log: bool,
    /// The axis of values starts at zero.
    pub(super) from_zero: bool,
    /// Last drawn is on top.
    pub(super) curves: Vec<Curve<'a>>,
    /// Steps marked at the foot: skipped updates.
    pub(super) skipped: &'a [u64],
    /// Steps marked by a line: resumes.
    pub(super) resumed: &'a [u64],
}

const WIDTH: f64 = 560.0;
const HEIGHT: f64 = 270.0;
const LEFT: f64 = 58.0;
const RIGHT: f64 = 24.0;
const TOP: f64 = 40.0;
const BOTTOM: f64 = 44.0;

/// Points drawn per curve.
const MOST_POINTS: usize = 1000;

impl Chart<'_> {
    /// The chart as an `<svg>` element.
    pub(super) fn draw(&self) -> String {
        let curves: Vec<(&Curve<'_>, Vec<(f64, f64)>)> = self
            .curves
            .iter()
            .map(|curve| {
                let shown = |(x, y): &&(f64, f64)| {
                    x.is_finite() && y.is_finite() && (!self.log || *y > 0.0)
                };
                (curve, thin(&curve.points.iter().filter(shown).copied().collect::<Vec<_>>()))
            })
            .collect();
        let mut svg = format!(
            "<svg class=\"chart\" viewBox=\"0 0 {WIDTH} {HEIGHT}\" role=\"img\" aria-label=\"{0}\">\n\
             <text class=\"title\" x=\"{LEFT}\" y=\"18\">{0}</text>\n",
            escape(self.title)
        );
        let points = || curves.iter().flat_map(|(_, points)| points.iter());
        let (Some(xs), Some(values)) = (range(points().map(|p| p.0)), range(points().map(|p| p.1)))
        else {
            let (x, y) = (WIDTH / 2.0, HEIGHT / 2.0);
            let _ =
                write!(svg, "<text class=\"tick\" x=\"{x}\" y=\"{y}\">no values yet</text></svg>");
            return svg;
        };
        // From step 0 on, so that the charts of a page line up.
        let x_axis = Axis::new((0.0, xs.1), LEFT, WIDTH - RIGHT, false, 1.0);
        let y_axis = Axis::new(self.spread(values), HEIGHT - BOTTOM, TOP, self.log, 0.0);

        self.draw_axes(&mut svg, &x_axis, &y_axis);
        self.draw_marks(&mut svg, &x_axis);
        for (curve, points) in &curves {
            let path: Vec<String> = points
                .iter()
                .map(|&(x, y)| format!("{:.1},{:.1}", x_axis.place(x), y_axis.place(y)))
                .collect();
            match path.as_slice() {
                [] => {}
                [point] => {
                    let (x, y) = point.split_once(',').unwrap_or_default();
                    let class = curve.class;
                    let _ =
                        writeln!(svg, "<circle class=\"{class}\" cx=\"{x}\" cy=\"{y}\" r=\"3\"/>");
                }
                _ => {
                    let (class, path) = (curve.class, path.join(" "));
                    let _ = writeln!(svg, "<polyline class=\"{class}\" points=\"{path}\"/>");
                }
            }
        }
        self.draw_legend(&mut svg);
        svg.push_str("</svg>");
        svg
    }

    /// The range of values that the axis shows: some air around the curves.
    fn spread(&self, (low, high): (f64, f64)) -> (f64, f64) {
        if self.log {
            let air = (high / low).powf(0.05).max(1.02);
            return (low / air, high * air);
        }
        let air = if high > low { 0.05 * (high - low) } else { 0.1 * high.abs().max(1e-9) };
        let low = if self.from_zero && low >= 0.0 { 0.0 } else { low - air };
        (low, high + air)
    }

    fn draw_axes(&self, svg: &mut String, x_axis: &Axis, y_axis: &Axis) {
        let (right, foot) = (WIDTH - RIGHT, HEIGHT - BOTTOM);
        for (value, label) in y_axis.ticks(6) {
            let y = y_axis.place(value);
            let _ = writeln!(
                svg,
                "<line class=\"grid\" x1=\"{LEFT}\" y1=\"{y:.1}\" x2=\"{right}\" y2=\"{y:.1}\"/>\
                 <text class=\"tick end\" x=\"{:.1}\" y=\"{:.1}\">{label}</text>",
                LEFT - 7.0,
                y + 4.0
            );
        }
        for (value, label) in x_axis.ticks(6) {
            let x = x_axis.place(value);
            let _ = writeln!(
                svg,
                "<line class=\"axis\" x1=\"{x:.1}\" y1=\"{foot}\" x2=\"{x:.1}\" y2=\"{:.1}\"/>\
                 <text class=\"tick\" x=\"{x:.1}\" y=\"{:.1}\">{label}</text>",
                foot + 4.0,
                foot + 18.0
            );
        }
        let _ = writeln!(
            svg,
            "<line class=\"axis\" x1=\"{LEFT}\" y1=\"{foot}\" x2=\"{right}\" y2=\"{foot}\"/>\
             <text class=\"tick\" x=\"{:.1}\" y=\"{:.1}\">step</text>\
             <text class=\"tick end\" x=\"{right}\" y=\"34\">{}</text>",
            (LEFT + right) / 2.0,
            HEIGHT - 8.0,
            escape(self.unit)
        );
    }

    fn draw_marks(&self, svg: &mut String, x_axis: &Axis) {
        let foot = HEIGHT - BOTTOM;
        let shown = |steps: &[u64]| -> Vec<f64> {
            steps.iter().filter_map(|&step| x_axis.place_inside(step as f64)).collect()
        };
        for x in shown(self.resumed) {
            let _ = writeln!(
                svg,
                "<line class=\"resumed\" x1=\"{x:.1}\" y1=\"{TOP}\" x2=\"{x:.1}\" y2=\"{foot}\"/>"
            );
        }
        for x in shown(self.skipped) {
            let (left, right, high) = (x - 4.0, x + 4.0, foot - 8.0);
            let _ = writeln!(
                svg,
                "<path class=\"skipped\" d=\"M{left:.1},{foot} L{right:.1},{foot} L{x:.1},{high} Z\"/>"
            );
        }
    }

    /// Names of the curves, right of the title; none for a single curve.
    fn draw_legend(&self, svg: &mut String) {
        if self.curves.len() < 2 {
            return;
        }
        let mut x = WIDTH - RIGHT;
        for curve in self.curves.iter().rev() {
            // About the width of the words in the page's small sans serif.
            x -= 6.2 * curve.name.chars().count() as f64;
            let (from, to) = (x - 24.0, x - 6.0);
            let _ = writeln!(
                svg,
                "<line class=\"{}\" x1=\"{from:.1}\" y1=\"14\" x2=\"{to:.1}\" y2=\"14\"/>\
                 <text class=\"tick start\" x=\"{x:.1}\" y=\"18\">{}</text>",
                curve.class,
                escape(curve.name)
            );
            x -= 38.0;
        }
    }
}

/// Values to places along one side of a chart.
pub(super) struct Axis {
    low: f64,
    high: f64,
    from: f64,
    to: f64,
    log: bool,
    /// Ticks are at least this far apart: there are no halves of steps.
    least_step: f64,
}

impl Axis {
    pub(super) fn new(
        (low, high): (f64, f64),
        from: f64,
        to: f64,
        log: bool,
        least_step: f64,
    ) -> Self {
        let high = if high > low { high } else { low + 1.0 };
        Self { low, high, from, to, log, least_step }
    }

    pub(super) fn place(&self, value: f64) -> f64 {
        let share = if self.log {
            (value / self.low).ln() / (self.high / self.low).ln()
        } else {
            (value - self.low) / (self.high - self.low)
        };
        self.from + share * (self.to - self.from)
    }

    fn place_inside(&self, value: f64) -> Option<f64> {
        (self.low..=self.high).contains(&value).then(|| self.place(value))
    }

    /// Round values inside the axis, about `count`, with their labels.
    pub(super) fn ticks(&self, count: usize) -> Vec<(f64, String)> {
        let log_ticks = if self.log { self.log_ticks(count) } else { Vec::new() };
        if log_ticks.len() > 2 {
            return log_ticks
                .into_iter()
                .map(|value| (value, label(value, value, value)))
                .collect();
        }
        let step = round_step((self.high - self.low) / count as f64).max(self.least_step);
        let first = (self.low / step).ceil() as i64;
        let last = (self.high / step).floor() as i64;
        let largest = self.low.abs().max(self.high.abs());
        (first..=last)
            .map(|n| n as f64 * step)
            .map(|value| (value, label(value, step, largest)))
            .collect()
    }

    /// Powers of ten, with their double and fivefold where these fit.
    fn log_ticks(&self, count: usize) -> Vec<f64> {
        let decades = self.low.log10().floor() as i32..=self.high.log10().ceil() as i32;
        let inside = |factors: &[f64]| -> Vec<f64> {
            decades
                .clone()
                .flat_map(|decade| factors.iter().map(move |factor| factor * 10f64.powi(decade)))
                .filter(|value| (self.low..=self.high).contains(value))
                .collect()
        };
        let all = inside(&[1.0, 2.0, 5.0]);
        if all.len() <= count + 2 { all } else { inside(&[1.0]) }
    }
}

/// 1, 2 or 5 times a power of ten, at least `least`.
fn round_step(least: f64) -> f64 {
    let decade = 10f64.powf(least.log10().floor());
    let factor = [1.0, 2.0, 5.0, 10.0].into_iter().find(|factor| factor * decade >= least * 0.999);
    factor.unwrap_or(10.0) * decade
}

/// `value` with as many digits as ticks `step` apart need, in powers of ten where even the `largest` is small.
fn label(value: f64, step: f64, largest: f64) -> String {
    if value == 0.0 {
        return "0".into();
    }
    // A step of 2.9999999999999997e-5 is one of 3e-5.
    let digit_of = |value: f64| (value.abs().log10() + 1e-9).floor() as i32;
    if largest >= 1e-2 {
        let decimals = usize::try_from(-digit_of(step)).unwrap_or(0);
        return if largest >= 1e6 {
            format!("{}M", number(value / 1e6, usize::try_from(6 - digit_of(step)).unwrap_or(0)))
        } else {
            number(value, decimals)
        };
    }
    let digits = (digit_of(value) - digit_of(step)).max(0) as usize;
    let text = format!("{value:.digits$e}");
    match text.split_once('e') {
        // 1.0e-4 and 1.5e-4 share an axis; a mantissa's zeros say nothing.
        Some((mantissa, exponent)) if mantissa.contains('.') => {
            format!("{}e{exponent}", mantissa.trim_end_matches('0').trim_end_matches('.'))
        }
        _ => text,
    }
}

/// `value` with `decimals` digits after the point, and a comma between thousands.
pub(super) fn number(value: f64, decimals: usize) -> String {
    let text = format!("{value:.decimals$}");
    let (sign, digits) = text.strip_prefix('-').map_or(("", text.as_str()), |rest| ("-", rest));
    let (whole, fraction) = digits.split_at(digits.find('.').unwrap_or(digits.len()));
    let mut grouped = String::from(sign);
    for (index, digit) in whole.chars().enumerate() {
        if index > 0 && (whole.len() - index) % 3 == 0 {
            grouped.push(',');
        }
        grouped.push(digit);
    }
    grouped + fraction
}

fn range(values: impl Iterator<Item = f64>) -> Option<(f64, f64)> {
    values.fold(None, |range, value| match range {
        None => Some((value, value)),
        Some((low, high)) => Some((low.min(value), high.max(value))),
    })
}

/// At most [`MOST_POINTS`] of the points: the first, the last, and the lowest and highest of equal runs between them,
/// so that no spike is lost.
fn thin(points: &[(f64, f64)]) -> Vec<(f64, f64)> {
    if points.len() <= MOST_POINTS {
        return points.to_vec();
    }
    let inner = &points[1..points.len() - 1];
    let run = inner.len().div_ceil(MOST_POINTS / 2 - 1);
    let mut kept = vec![points[0]];
    for run in inner.chunks(run) {
        let by_value = |a: &&(f64, f64), b: &&(f64, f64)| a.1.total_cmp(&b.1);
        let lowest = run.iter().min_by(by_value);
        let highest = run.iter().max_by(by_value);
        let mut pair: Vec<(f64, f64)> = lowest.into_iter().chain(highest).copied().collect();
        pair.sort_by(|a, b| a.0.total_cmp(&b.0));
        pair.dedup();
        kept.extend(pair);
    }
    kept.push(points[points.len() - 1]);
    kept
}

/// `text` for use between tags and in quoted attributes.
pub(super) fn escape(text: &str) -> String {
    let mut escaped = String::with_capacity(text.len());
    for character in text.chars() {
        match character {
            '&' => escaped.push_str("&amp;"),
            '<' => escaped.push_str("&lt;"),
            '>' => escaped.push_str("&gt;"),
            '"' => escaped.push_str("&quot;"),
            '\'' => escaped.push_str("&#39;"),
            other => escaped.push(other),
        }
    }
    escaped
}

#[cfg(test)]
mod tests {
    use super::*;

    fn chart(log: bool, points: Vec<(f64, f64)>) -> String {
        let curves = vec![Curve { name: "a", class: "main", points }];
        let (skipped, resumed) = (&[3, 999][..], &[5][..]);
        Chart { title: "T<", unit: "u", log, from_zero: false, curves, skipped, resumed }.draw()
    }

    fn polyline(svg: &str) -> Vec<(f64, f64)> {
        let points = svg.split_once("points=\"").unwrap().1.split_once('"').unwrap().0;
        let pair = |point: &str| {
            let (x, y) = point.split_once(',').unwrap();
            (x.parse().unwrap(), y.parse().unwrap())
        };
        points.split(' ').map(pair).collect()
    }

    #[test]
    fn a_point_stands_where_the_axes_say() {
        let drawn = polyline(&chart(false, vec![(0.0, 1.0), (5.0, 3.0), (10.0, 2.0)]));
        // Values 1 to 3 with a twentieth of air: the axis runs from 0.9 to 3.1.
        let y = |value: f64| TOP + (3.1 - value) / 2.2 * (HEIGHT - BOTTOM - TOP);
        let x = |step: f64| LEFT + step / 10.0 * (WIDTH - LEFT - RIGHT);
        for ((step, value), (found_x, found_y)) in
            [(0.0, 1.0), (5.0, 3.0), (10.0, 2.0)].into_iter().zip(drawn)
        {
            assert!((found_x - x(step)).abs() <= 0.06, "{found_x} for step {step}");
            assert!((found_y - y(value)).abs() <= 0.06, "{found_y} for value {value}");
        }
    }

    #[test]
    fn equal_ratios_are_equally_far_apart_on_a_logarithmic_axis() {
        let drawn = polyline(&chart(true, vec![(0.0, 8.0), (1.0, 2.0), (2.0, 0.5), (3.0, -1.0)]));
        assert_eq!(drawn.len(), 3, "a value that is not positive has no place");
        assert!((drawn[1].1 - drawn[0].1 - (drawn[2].1 - drawn[1].1)).abs() <= 0.11);
        assert!(drawn[0].1 < drawn[1].1);
    }

    #[test]
    fn long_curves_are_thinned_but_keep_their_ends_and_spikes() {
        let mut points: Vec<(f64, f64)> = (0..54_321).map(|n| (f64::from(n), 1.0)).collect();
        points[0].1 = 2.0;
        points[20_011].1 = 9.0;
        points[40_003].1 = -7.0;
        points[54_320].1 = 3.0;
        let kept = thin(&points);
        assert!(kept.len() <= 1000);
        assert!(kept.windows(2).all(|pair| pair[0].0 < pair[1].0));
        for spike in [0, 20_011, 40_003, 54_320] {
            assert!(kept.contains(&points[spike]), "point {spike} is lost");
        }
        let short = vec![(1.0, 1.0); 1000];
        assert_eq!(thin(&short), short);
    }

    #[test]
    fn marks_stand_at_their_steps_and_only_inside_the_chart() {
        let svg = chart(false, vec![(0.0, 1.0), (10.0, 2.0)]);
        assert_eq!(svg.matches("class=\"skipped\"").count(), 1);
        assert_eq!(svg.matches("class=\"resumed\"").count(), 1);
        assert!(svg.contains("T&lt;") && !svg.contains("T<"));
    }

    #[test]
    fn no_values_one_value_and_equal_values_are_drawn_without_a_number_that_is_not_finite() {
        let nan = f64::NAN;
        for points in [vec![], vec![(1.0, nan)], vec![(1.0, 0.0)], vec![(0.0, 4.0), (9.0, 4.0)]] {
            for log in [false, true] {
                let svg = chart(log, points.clone());
                assert!(!svg.contains("NaN") && !svg.contains("inf"), "{svg}");
            }
        }
        assert!(chart(false, vec![(1.0, nan)]).contains("no values yet"));
    }

    #[test]
    fn ticks_are_round_and_labelled_with_the_digits_they_need() {
        let labels = |low, high, log, least| -> Vec<String> {
            let ticks = Axis::new((low, high), 0.0, 1.0, log, least).ticks(6);
            ticks.into_iter().map(|(_, label)| label).collect()
        };
        assert_eq!(labels(0.0, 1.05, false, 0.0), ["0", "0.2", "0.4", "0.6", "0.8", "1.0"]);
        assert_eq!(labels(0.0, 12_000.0, false, 1.0)[1..3], ["2,000", "4,000"]);
        assert_eq!(labels(0.0, 3.0, false, 1.0), ["0", "1", "2", "3"]);
        assert_eq!(labels(0.0, 6.3e-4, false, 0.0)[1..3], ["2e-4", "4e-4"]);
        assert_eq!(labels(0.0, 3e6, false, 1.0)[1..3], ["0.5M", "1.0M"]);
        assert_eq!(labels(0.9, 120.0, true, 0.0), ["1", "2", "5", "10", "20", "50", "100"]);
        assert_eq!(labels(1e-4, 10.0, true, 0.0), ["1e-4", "1e-3", "0.01", "0.1", "1", "10"]);
        assert_eq!(labels(0.41, 0.47, true, 0.0)[0], "0.41");
        assert_eq!(number(-1_234_567.891, 2), "-1,234,567.89");
        assert_eq!(number(999.0, 0), "999");
    }
}
