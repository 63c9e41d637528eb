//! The profile of a step: it names every op, counts what a step does, and changes no bit of the run.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use std::sync::atomic::AtomicBool;
use std::time::Duration;
use std::{fs, iter};

use pixmim::DType;
use pixmim::model::MaeConfig;
use pixmim::model::activations::Batch;
use pixmim::model::cost::forward_backward;
use pixmim::ops::cost::{Cost, Peaks};
use pixmim::train::config::Config;
use pixmim::train::run::{Event, Options, run};
use pixmim::train::timing::StepProfile;
use serde_json::Value;
use tempfile::tempdir;

use crate::{assert_same_run, photos, tiny, train_anew};

/// Runs with a profile; the profile, and the folder it was written to.
fn profiled(config: &Config, options: Options) -> (StepProfile, Option<PathBuf>) {
    let mut told = None;
    let options = Options { profile: true, ..options };
    run(config, &options, &AtomicBool::new(false), &mut |event| match event {
        Event::Profile(profile, folder) => {
            told = Some((profile.clone(), folder.map(Path::to_owned)))
        }
        Event::Step { .. } => assert!(told.is_some(), "it is told before the first step"),
        _ => {}
    })
    .unwrap();
    told.unwrap()
}

/// Without its name space and prefix, so that only what a reader of XML would see is left: each tag closes in its turn.
fn assert_well_formed(svg: &str) {
    let mut open = Vec::new();
    for tag in svg.split('<').skip(1) {
        let tag = tag.split('>').next().unwrap();
        assert_eq!(tag.matches('"').count() % 2, 0, "<{tag}>");
        let name = tag.trim_start_matches('/').split([' ', '/']).next().unwrap();
        if tag.starts_with('/') {
            assert_eq!(open.pop(), Some(name));
        } else if !tag.ends_with('/') {
            open.push(name);
        }
    }
    assert_eq!(open, [""; 0]);
}

#[test]
fn a_profile_changes_no_bit_of_the_run_and_is_left_in_its_folder() {
    let (data, dir) = (photos(13), tempdir().unwrap());
    let config = |name: &str| tiny(data.path(), &dir.path().join(name));
    let (plain, with) = (config("plain"), config("with"));
    train_anew(&plain);
    let (profile, folder) = profiled(&with, Options::default());
    assert_same_run("with a profile", &plain.log.out, &with.log.out, 10);

    let folder = folder.unwrap();
    assert_eq!(folder, with.log.out.join("profile"));
    let names: Vec<_> = crate::files(&folder).into_iter().map(|(name, _)| name).collect();
    assert_eq!(names, ["step.csv", "step.svg", "trace.json"]);
    let text = |name: &str| fs::read_to_string(folder.join(name)).unwrap();
    assert_eq!(text("step.csv"), profile.csv());
    let report = fs::read_to_string(with.log.out.join("report.html")).unwrap();
    assert!(report.contains("<h2>Profile</h2>") && report.contains("block 1"), "{report}");
    assert!(!report.contains("http:"), "the report needs nothing else");

    // What replaces the run leaves none of it.
    let again = Options { overwrite: true, ..Options::default() };
    run(&with, &again, &AtomicBool::new(false), &mut |_| {}).unwrap();
    assert!(!folder.exists());
    let report = fs::read_to_string(with.log.out.join("report.html")).unwrap();
    assert!(!report.contains("<h2>Profile</h2>"));
}

#[cfg(pixmim_simt)]
#[test]
fn on_a_gpu_neither_and_all_its_work_is_named() {
    let (data, dir) = (photos(13), tempdir().unwrap());
    let config = |name: &str| {
        let mut config = tiny(data.path(), &dir.path().join(name));
        config.runtime.device = "simt".into();
        config.runtime.precision = "bf16".into();
        config.schedule.steps = Some(3);
        config
    };
    let (plain, with) = (config("plain"), config("with"));
    train_anew(&plain);
    let (profile, _) = profiled(&with, Options::default());
    assert_same_run("with a profile, on a GPU", &plain.log.out, &with.log.out, 3);
    assert!(profile.recorded && profile.device == "host executor", "{}", profile.summary());
    let rows = profile.rows();
    let calls = |op: &str| rows.iter().find(|row| row.op == op).unwrap().calls;
    // Geometry, images, samples and epoch of both micro-batches, and the learning rate; then loss, norm and verdict.
    assert_eq!((calls("upload"), calls("read")), (2 * 4 + 1, 3));
    assert_network_is_counted(&profile, &with.model, DType::Bf16);
}

/// The network's ops must have the work that `model::cost` counts without calling them.
fn assert_network_is_counted(profile: &StepProfile, config: &MaeConfig, dtype: DType) {
    let others = ["random_masking", "input", "low_freq_target", "masked_mse_loss", "grad_norm"];
    let others = others.into_iter().chain(["adamw", "upload", "read", "copy", "clear"]);
    let others: Vec<_> = others.collect();
    let rows = profile.rows();
    let network = rows.iter().filter(|row| !others.contains(&row.op));
    let found: Cost = network.map(|row| row.cost).sum();
    // A quarter of 16 patches is kept.
    let batch = Batch { images: 4, kept: 4, predicted: 12 };
    assert_eq!(found, forward_backward(config, batch, dtype) * 2);
}

#[test]
fn a_profile_counts_what_a_step_of_two_micro_batches_does() {
    let (data, dir) = (photos(13), tempdir().unwrap());
    let config = tiny(data.path(), &dir.path().join("run"));
    let (profile, folder) = profiled(&config, Options { dry_run: true, ..Options::default() });
    assert!(folder.is_none() && !config.log.out.exists(), "a dry run writes nothing");
    assert_network_is_counted(&profile, &config.model, DType::F32);

    let rows = profile.rows();
    assert!(rows.is_sorted_by(|a, b| a.took >= b.took), "the longest first: {rows:?}");
    let calls: BTreeMap<_, _> =
        rows.iter().map(|row| ((row.op, row.direction), row.calls)).collect();
    // Three blocks with four layers each, the decoder's embedding and prediction; twice.
    assert_eq!(calls[&("linear", "forward")], 2 * (3 * 4 + 2));
    assert_eq!(calls[&("linear", "backward")], calls[&("linear", "forward")]);
    assert_eq!(calls[&("attention", "backward")], 2 * 3);
    assert_eq!(calls[&("masked_mse_loss", "forward_backward")], 2);
    // Once for both.
    assert_eq!((calls[&("grad_norm", "forward")], calls[&("adamw", "update")]), (1, 2));

    // One micro-batch is measured; a step has its time twice, and that of all else once.
    let stages = ["forward", "backward"].map(|name| {
        profile.profile.spans().find(|span| span.depth == 0 && span.name == name).unwrap().took()
    });
    assert_eq!(profile.took(), profile.profile.took() + stages[0] + stages[1]);
    let in_ops: Duration = rows.iter().map(|row| row.took).sum();
    assert_eq!(in_ops + profile.idle(), profile.took());

    assert_tells(&profile);
}

/// Table, figures, trace and picture must be of the profile.
fn assert_tells(profile: &StepProfile) {
    let rows = profile.rows();
    let csv = profile.csv();
    let lines: Vec<Vec<&str>> = csv.lines().skip(1).map(|line| line.split(',').collect()).collect();
    assert!(lines.iter().all(|line| line.len() == 9), "{csv}");
    assert_eq!(lines.len(), 1 + rows.len() + 2);
    let column = |line: &[&str], name| -> f64 {
        line[lines[0].iter().position(|column| *column == name).unwrap()].parse().unwrap()
    };
    let shares: f64 = lines[1..lines.len() - 1].iter().map(|line| column(line, "share")).sum();
    assert!((shares - 1.0).abs() <= 1e-3, "{csv}");
    let linear = lines.iter().find(|line| line[..2] == ["linear", "backward"]).unwrap();
    assert!(column(linear, "roof_share") > 0.0 && column(linear, "tflop_per_s") > 0.0, "{csv}");
    let no_roof = StepProfile { peaks: None, ..profile.clone() };
    assert!(no_roof.csv().lines().skip(2).all(|line| line.ends_with(",,")), "{}", no_roof.csv());
    // Operations of a rate that takes as long as they took: all of the roof.
    let row = rows.iter().find(|row| (row.op, row.direction) == ("linear", "backward")).unwrap();
    let flops_per_second = row.cost.flops as f64 / row.took.as_secs_f64();
    let peaks = Some(Peaks { bytes_per_second: f64::INFINITY, flops_per_second });
    let table = StepProfile { peaks, ..profile.clone() }.table();
    let line = table.lines().find(|line| line.starts_with("linear           backward")).unwrap();
    assert!(line.ends_with(" 100.0 % compute"), "{table}");

    let trace: Value = serde_json::from_str(&profile.trace()).unwrap();
    let events = trace["traceEvents"].as_array().unwrap();
    let mut open: Vec<f64> = Vec::new();
    let mut last = 0.0;
    for (event, span) in iter::zip(&events[2..], profile.profile.spans()) {
        let number = |key: &str| event[key].as_f64().unwrap();
        let (begin, end) = (number("ts"), number("ts") + number("dur"));
        assert!(event["ph"] == "X" && event["pid"] == 1 && event["tid"] == 1, "{event}");
        assert!(event["name"].as_str().unwrap().starts_with(span.name), "{event}");
        assert_eq!(event["cat"], if span.cost.is_some() { "op" } else { "stage" });
        assert!(begin >= last && end >= begin, "{event} begins before {last}");
        // What the viewer draws above each other lies within each other, to its nanosecond.
        open.truncate(span.depth);
        assert!(
            open.len() == span.depth && open.iter().all(|&o| end <= o + 1e-3),
            "{event} {open:?}"
        );
        open.push(end);
        last = begin;
    }
    assert_eq!(events.len(), 2 + profile.profile.spans().count());
    assert!(events[..2].iter().all(|event| event["ph"] == "M"));

    let svg = profile.svg();
    assert_well_formed(&svg);
    for part in ["forward", "encoder", "block 1", "update", ">linear ", ">no op ", " TFLOP/s"] {
        assert!(svg.contains(part), "{part:?} is not drawn");
    }
}
