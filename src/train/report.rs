//! `report.html`: what a run did and what it learned, in one file without scripts or outside resources.

use std::fmt::Write as _;
use std::path::{Path, PathBuf};

use super::StepRecord;
use super::files::write_atomic;
use super::metrics::{BadImage, Notice, NoticeKind};
use super::pictures::Scores;
use super::svg::{Chart, Curve, escape, number};
use super::timeline::{Saved, early_heavy};
use crate::{Error, Result};

/// What the report is made of.
#[derive(Clone, Copy, Debug)]
pub struct Report<'a> {
    /// The run's name: method, preset, data.
    pub title: &'a str,
    /// Where it stands: "finished", "running", "interrupted; --resume auto goes on".
    pub status: &'a str,
    /// Updates done.
    pub steps: u64,
    /// Updates planned.
    pub planned: u64,
    /// Smoothed loss at the end.
    pub loss: f64,
    /// Images per second.
    pub images_per_s: f64,
    /// Model FLOPs utilisation, of a measured peak; not a number where times mean nothing.
    pub mfu: f64,
    /// The logged steps, in order.
    pub records: &'a [StepRecord],
    /// The saved pictures, in order; some of them are shown.
    pub pictures: &'a [Saved],
    /// A strip of reconstructions over time, a PNG file.
    pub timeline: Option<&'a Path>,
    /// The timeline of a step, an SVG file of [`StepProfile::write`](super::timing::StepProfile::write).
    pub profile: Option<&'a Path>,
    /// What happened: skipped steps, resumes, warnings.
    pub notices: &'a [Notice],
    /// Images that could not be used.
    pub bad_images: &'a [BadImage],
    /// The run's plan, as names and values: device, batch, data, parameters.
    pub facts: &'a [(&'a str, String)],
    /// The resolved configuration, as text.
    pub config: &'a str,
    /// What it ran on, as names and values: versions, machine, command line.
    pub environment: &'a [(&'a str, String)],
}

/// Grids in the report, at most.
const MOST_PICTURES: usize = 8;
/// Bytes of PNG files in the report, at most, as long as one picture is left: a browser must open it in a moment.
const MOST_PICTURE_BYTES: u64 = 16 << 20;
/// Bad images listed; the journal has all.
const MOST_BAD_IMAGES: usize = 100;
/// Improvements in dB below which a verdict speaks of nothing, and of a beginning.
const NOTHING_DB: f64 = 0.3;
const BEGINNING_DB: f64 = 2.0;

/// Writes `report.html` into the run folder `dir`, whole or not at all.
///
/// # Errors
/// [`Error::Io`] when a picture cannot be read or the report cannot be written.
pub fn write(dir: &Path, report: &Report<'_>) -> Result<PathBuf> {
    let path = dir.join("report.html");
    write_atomic(&path, html(report)?.as_bytes())?;
    Ok(path)
}

fn html(report: &Report<'_>) -> Result<String> {
    let title = escape(report.title);
    let mut page = format!(
        "<!DOCTYPE html>\n<html lang=\"en\">\n<head>\n<meta charset=\"utf-8\">\n\
         <meta name=\"viewport\" content=\"width=device-width, initial-scale=1\">\n<title>{title}</title>\n\
         <style>\n{}</style>\n</head>\n<body>\n<header>\n<h1>{title}</h1>\n\
         <div class=\"soft\">step {} of {} &middot; {}</div>\n</header>\n",
        include_str!("report.css"),
        number(report.steps as f64, 0),
        number(report.planned as f64, 0),
        escape(report.status),
    );
    summary(&mut page, report);
    timeline(&mut page, report)?;
    curves(&mut page, report);
    profile(&mut page, report)?;
    pictures(&mut page, report)?;
    events(&mut page, report);
    bad_images(&mut page, report.bad_images);
    table(&mut page, "Run", report.facts);
    table(&mut page, "Environment", report.environment);
    let _ = write!(
        page,
        "<h2>Configuration</h2>\n<pre>{}</pre>\n<footer>pixmim {}</footer>\n</body>\n</html>\n",
        escape(report.config),
        escape(crate::VERSION)
    );
    Ok(page)
}

fn summary(page: &mut String, report: &Report<'_>) {
    let scores = report.pictures.last().map(|picture| &picture.scores);
    let first_loss = report.records.iter().map(|record| record.loss).find(|loss| loss.is_finite());
    let from = first_loss.map_or(String::new(), |loss| format!(", from {}", finite(loss, 4)));
    let mut tiles = vec![
        (number(report.steps as f64, 0), format!("steps of {}", number(report.planned as f64, 0))),
        (finite(report.loss, 4), format!("loss, smoothed{from}")),
        (finite(report.images_per_s, speed_decimals(report.images_per_s)), "images/s".into()),
    ];
    if report.mfu.is_finite() {
        tiles.push((finite(100.0 * report.mfu, 1), "% of the peak (MFU)".into()));
    }
    if let Some(scores) = scores {
        let baseline = format!("masked PSNR; {} {}", baseline_name(scores), db(scores.baseline()));
        tiles.push((db(scores.prediction), baseline));
    }
    page.push_str("<section class=\"tiles\">\n");
    for (value, name) in tiles {
        let _ = writeln!(page, "<div class=\"tile\"><b>{value}</b><span>{name}</span></div>");
    }
    page.push_str("</section>\n");
    if let Some(scores) = scores {
        let (class, words) = verdict(scores);
        let _ = writeln!(page, "<p class=\"verdict {class}\">{words}</p>");
    }
}

/// A class of the style sheet, and what the last picture says about the network, in plain words.
fn verdict(scores: &Scores) -> (&'static str, String) {
    let gain = scores.prediction - scores.baseline();
    let fill = match scores.flat_patches {
        Some(_) => "filling every masked patch with its own mean, which norm_pix gives away",
        None => "filling the masked patches with the mean colour of the visible ones",
    };
    if !gain.is_finite() {
        ("warn", "The prediction is not a number: the weights are damaged.".into())
    } else if gain < NOTHING_DB {
        let words = format!(
            "The network does not reconstruct yet: its masked patches are {} than {fill} ({gain:+.2} dB). That is \
             normal early in training; if it stays so, look at the loss and the learning rate below.",
            if gain < 0.0 { "worse" } else { "hardly better" }
        );
        ("warn", words)
    } else if gain < BEGINNING_DB {
        let words = format!(
            "The network has begun to reconstruct: its masked patches are {gain:.2} dB better than {fill}. Longer \
             training should sharpen them."
        );
        ("", words)
    } else {
        (
            "good",
            format!(
                "The network reconstructs: its masked patches are {gain:.2} dB better than {fill}."
            ),
        )
    }
}

fn baseline_name(scores: &Scores) -> &'static str {
    if scores.flat_patches.is_some() { "flat patches" } else { "mean colour" }
}

fn timeline(page: &mut String, report: &Report<'_>) -> Result<()> {
    let Some(path) = report.timeline else { return Ok(()) };
    page.push_str("<h2>What it learned</h2>\n<figure>");
    image(page, path, "The same images reconstructed at different steps")?;
    page.push_str(
        "<figcaption>The same images over time: masked patches as the network predicts them, visible patches as \
         they are. The last column is what it is asked for.</figcaption></figure>\n",
    );
    Ok(())
}

fn curves(page: &mut String, report: &Report<'_>) {
    let steps_of = |kind| -> Vec<u64> {
        let of_kind = report.notices.iter().filter(|notice| notice.kind == kind);
        of_kind.map(|notice| notice.step).collect()
    };
    let skipped = steps_of(NoticeKind::Skipped);
    let resumed = steps_of(NoticeKind::Resumed);
    let logged = |value: fn(&StepRecord) -> f64| -> Vec<(f64, f64)> {
        report.records.iter().map(|record| (record.step as f64, value(record))).collect()
    };
    let loss = logged(|record| record.loss);
    let smoothed = smooth(&loss);
    let chart = |title, unit, log, from_zero, curves| {
        let chart =
            Chart { title, unit, log, from_zero, curves, skipped: &skipped, resumed: &resumed };
        chart.draw()
    };
    let losses = || {
        vec![
            Curve { name: "logged step", class: "faint", points: loss.clone() },
            Curve { name: "smoothed", class: "main", points: smoothed.clone() },
        ]
    };
    let single = |points| vec![Curve { name: "", class: "main", points }];
    let mut charts = vec![
        chart("Loss", "", false, false, losses()),
        chart("Loss, logarithmic", "", true, false, losses()),
        chart("Learning rate", "", false, true, single(logged(|record| record.lr))),
        chart("Gradient norm", "", false, true, single(logged(|record| record.grad_norm))),
        chart("Throughput", "images/s", false, true, single(logged(|record| record.images_per_s))),
    ];
    let mfu = logged(|record| 100.0 * record.mfu);
    if mfu.iter().any(|(_, share)| share.is_finite()) {
        charts.push(chart("Model FLOPs utilisation", "%", false, true, single(mfu)));
    }
    if report.pictures.len() > 1 {
        let scored = |value: fn(&Scores) -> f64| -> Vec<(f64, f64)> {
            report.pictures.iter().map(|p| (p.step as f64, value(&p.scores))).collect()
        };
        let name = baseline_name(&report.pictures[0].scores);
        let curves = vec![
            Curve { name, class: "second", points: scored(Scores::baseline) },
            Curve { name: "prediction", class: "main", points: scored(|s| s.prediction) },
        ];
        charts.push(chart("Masked PSNR of the pictures", "dB", false, false, curves));
    }
    let _ = write!(
        page,
        "<h2>Curves</h2>\n<section class=\"charts\">\n{}\n</section>\n",
        charts.join("\n")
    );
    if !skipped.is_empty() || !resumed.is_empty() {
        page.push_str(
            "<p class=\"soft\">A triangle at the foot marks a skipped step, a dotted line a resume.</p>\n",
        );
    }
}

fn profile(page: &mut String, report: &Report<'_>) -> Result<()> {
    let Some(path) = report.profile else { return Ok(()) };
    let svg = std::fs::read_to_string(path).map_err(Error::io("read", path))?;
    // Of use to a file by itself only.
    let svg = svg.replacen(" xmlns=\"http://www.w3.org/2000/svg\"", "", 1);
    let _ = write!(
        page,
        "<h2>Profile</h2>\n<figure>{svg}<figcaption>One micro-batch and one update, before the first step. Point at a bar \
         for its time. profile/step.csv has the figures of each op; profile/trace.json opens in ui.perfetto.dev.\
         </figcaption></figure>\n"
    );
    Ok(())
}

/// Mean of the finite values over a twenty-fifth of the points, centred, so that the curve does not lag.
fn smooth(points: &[(f64, f64)]) -> Vec<(f64, f64)> {
    let finite: Vec<(f64, f64)> = points.iter().copied().filter(|(_, y)| y.is_finite()).collect();
    let half = finite.len() / 50;
    let mut sums = vec![0.0];
    sums.extend(finite.iter().scan(0.0, |sum, (_, value)| {
        *sum += value;
        Some(*sum)
    }));
    let mean_around = |at: usize| {
        // Narrower towards the ends, to stay centred there too.
        let half = half.min(at).min(finite.len() - 1 - at);
        (sums[at + half + 1] - sums[at - half]) / (2 * half + 1) as f64
    };
    finite.iter().enumerate().map(|(at, &(step, _))| (step, mean_around(at))).collect()
}

fn pictures(page: &mut String, report: &Report<'_>) -> Result<()> {
    let Some(last) = report.pictures.last() else { return Ok(()) };
    page.push_str("<h2>Pictures</h2>\n");
    let mut shown = Vec::new();
    for count in (1..=MOST_PICTURES).rev() {
        shown = match count {
            1 => vec![last],
            _ => early_heavy(report.pictures.len(), count)
                .into_iter()
                .map(|i| &report.pictures[i])
                .collect(),
        };
        let mut bytes = 0;
        for picture in &shown {
            bytes +=
                std::fs::metadata(&picture.path).map_err(Error::io("read", &picture.path))?.len();
        }
        if bytes <= MOST_PICTURE_BYTES {
            break;
        }
    }
    let all = report.pictures.len();
    if shown.len() < all {
        let _ = writeln!(
            page,
            "<p class=\"soft\">{} of {all}; the others are in the run folder.</p>",
            shown.len()
        );
    }
    for picture in shown.iter().rev() {
        let open = if picture.step == last.step { " open" } else { "" };
        let step = number(picture.step as f64, 0);
        let scores = &picture.scores;
        let _ = write!(
            page,
            "<details{open}><summary>step {step} <span class=\"soft\">&middot; masked PSNR {}, {} {}</span></summary>",
            db(scores.prediction),
            baseline_name(scores),
            db(scores.baseline())
        );
        image(page, &picture.path, &format!("Reconstructions at step {step}"))?;
        page.push_str("</details>\n");
    }
    Ok(())
}

fn events(page: &mut String, report: &Report<'_>) {
    page.push_str("<h2>Events</h2>\n");
    if report.notices.is_empty() {
        page.push_str(
            "<p class=\"soft\">None: no step was skipped, the run was never resumed.</p>\n",
        );
        return;
    }
    page.push_str("<div class=\"scroll\"><table>\n<tr><th>step</th><th>event</th><th></th></tr>\n");
    for notice in report.notices {
        let kind = match notice.kind {
            NoticeKind::Resumed => "resumed",
            NoticeKind::Skipped => "skipped",
            NoticeKind::Interrupted => "interrupted",
            NoticeKind::Warning => "warning",
        };
        let step = number(notice.step as f64, 0);
        let text = escape(&notice.text);
        let _ = writeln!(page, "<tr><td>{step}</td><td>{kind}</td><td>{text}</td></tr>");
    }
    page.push_str("</table></div>\n");
}

fn bad_images(page: &mut String, images: &[BadImage]) {
    page.push_str("<h2>Bad images</h2>\n");
    if images.is_empty() {
        page.push_str("<p class=\"soft\">None: every image could be read.</p>\n");
        return;
    }
    let shown = &images[..images.len().min(MOST_BAD_IMAGES)];
    let more = if shown.len() < images.len() {
        format!("; the first {MOST_BAD_IMAGES} are listed, bad_images.jsonl has all")
    } else {
        String::new()
    };
    let count = number(images.len() as f64, 0);
    let _ =
        writeln!(page, "<p class=\"soft\">{count} could not be used and were replaced{more}.</p>");
    page.push_str(
        "<div class=\"scroll\"><table>\n<tr><th>step</th><th>image</th><th>reason</th></tr>\n",
    );
    for BadImage { step, name, reason } in shown {
        let (name, reason) = (escape(name), escape(reason));
        let _ = writeln!(page, "<tr><td>{step}</td><td>{name}</td><td>{reason}</td></tr>");
    }
    page.push_str("</table></div>\n");
}

fn table(page: &mut String, title: &str, rows: &[(&str, String)]) {
    if rows.is_empty() {
        return;
    }
    let _ = writeln!(page, "<h2>{title}</h2>\n<table>");
    for (name, value) in rows {
        let _ = writeln!(page, "<tr><th>{}</th><td>{}</td></tr>", escape(name), escape(value));
    }
    page.push_str("</table>\n");
}

fn image(page: &mut String, path: &Path, words: &str) -> Result<()> {
    let png = std::fs::read(path).map_err(Error::io("read", path))?;
    let words = escape(words);
    let _ = write!(page, "<img alt=\"{words}\" src=\"data:image/png;base64,{}\">", base64(&png));
    Ok(())
}

fn db(value: f64) -> String {
    if value.is_nan() { "n/a".into() } else { format!("{value:.2} dB") }
}

fn finite(value: f64, decimals: usize) -> String {
    if value.is_finite() { number(value, decimals) } else { "n/a".into() }
}

/// Slow runs need a digit more.
fn speed_decimals(images_per_s: f64) -> usize {
    if images_per_s < 100.0 { 1 } else { 0 }
}

/// RFC 4648, section 4.
fn base64(bytes: &[u8]) -> String {
    const DIGITS: &[u8; 64] = b"ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789+/";
    let mut text = String::with_capacity(bytes.len().div_ceil(3) * 4);
    for chunk in bytes.chunks(3) {
        let byte = |i: usize| u32::from(chunk.get(i).copied().unwrap_or(0));
        let bits = byte(0) << 16 | byte(1) << 8 | byte(2);
        for digit in 0..4 {
            let value = bits >> (18 - 6 * digit) & 63;
            text.push(if digit <= chunk.len() { DIGITS[value as usize].into() } else { '=' });
        }
    }
    text
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn base64_agrees_with_the_vectors_of_rfc_4648() {
        for (bytes, text) in [
            ("", ""),
            ("f", "Zg=="),
            ("fo", "Zm8="),
            ("foo", "Zm9v"),
            ("foob", "Zm9vYg=="),
            ("fooba", "Zm9vYmE="),
            ("foobar", "Zm9vYmFy"),
        ] {
            assert_eq!(base64(bytes.as_bytes()), text);
        }
        assert_eq!(base64(&[0xfb, 0xff, 0xfe]), "+//+");
    }

    #[test]
    fn smoothing_keeps_lines_straight_and_leaves_out_what_is_not_finite() {
        let mut points: Vec<(f64, f64)> =
            (0..200).map(|n| (f64::from(n), f64::from(3 * n))).collect();
        points[77].1 = f64::NAN;
        let smoothed = smooth(&points);
        assert_eq!(smoothed.len(), 199);
        for (step, value) in smoothed {
            assert!((value - 3.0 * step).abs() <= 3.0, "{value} at {step}");
        }
        assert!(smooth(&[]).is_empty());
    }

    #[test]
    fn the_verdict_measures_norm_pix_against_what_the_target_gives_away() {
        let scores =
            |prediction, flat_patches| Scores { prediction, mean_colour: 12.0, flat_patches };
        assert!(verdict(&scores(20.0, Some(20.1))).1.contains("does not reconstruct yet"));
        assert!(verdict(&scores(20.0, None)).1.contains("8.00 dB better"));
        assert_eq!(verdict(&scores(13.0, None)).0, "");
        assert_eq!(verdict(&scores(f64::NAN, None)).0, "warn");
    }
}
