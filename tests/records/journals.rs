//! The journals: what is written, read back, and cut off on resume.

use std::fs;
use std::path::Path;

use pixmim::Error;
use pixmim::train::StepRecord;
use pixmim::train::metrics::{BadImage, BadImages, Metrics, Notice, NoticeKind, Notices, read};

use crate::record;

fn lines(dir: &Path, file: &str) -> Vec<String> {
    fs::read_to_string(dir.join(file)).unwrap().lines().map(str::to_owned).collect()
}

#[test]
fn a_line_is_one_json_object_and_line_1_names_the_schema_and_the_run() {
    let dir = tempfile::tempdir().unwrap();
    let mut metrics = Metrics::open(dir.path(), "a \"run\"", None).unwrap();
    metrics.write(&StepRecord { loss: 0.5, ..record(7) }).unwrap();
    let skipped = StepRecord { loss: f64::NAN, grad_norm: f64::INFINITY, ..record(8) };
    metrics.write(&skipped).unwrap();
    let rest = r#""images_per_s":329.0,"data_wait":0.125,"tflop_per_s":1.5,"mfu":0.625}"#;
    assert_eq!(
        lines(dir.path(), "metrics.jsonl"),
        [
            r#"{"schema":"pixmim-metrics-1","run":"a \"run\""}"#.to_owned(),
            format!(r#"{{"step":7,"epoch":1.75,"loss":0.5,"lr":0.00025,"grad_norm":0.5,{rest}"#),
            format!(r#"{{"step":8,"epoch":2.0,"loss":null,"lr":0.00025,"grad_norm":null,{rest}"#),
        ]
    );
    let back: Vec<StepRecord> = read(dir.path()).unwrap();
    assert_eq!(back[0], StepRecord { loss: 0.5, ..record(7) });
    assert!(back[1].loss.is_nan() && back[1].grad_norm.is_nan());
    assert_eq!((back[1].step, back.len()), (8, 2));
}

#[test]
fn lines_without_utilisation_as_older_versions_wrote_them_are_read() {
    let dir = tempfile::tempdir().unwrap();
    let old = concat!(
        r#"{"schema":"pixmim-metrics-1","run":"old"}"#,
        "\n",
        r#"{"step":7,"epoch":1.75,"loss":0.5,"lr":0.00025,"grad_norm":0.5,"images_per_s":329.0,"data_wait":0.125}"#,
        "\n"
    );
    fs::write(dir.path().join("metrics.jsonl"), old).unwrap();
    // A run of this version goes on with it, on a device whose times mean something and on one where they do not.
    let mut metrics = Metrics::open(dir.path(), "new", Some(7)).unwrap();
    metrics.write(&record(8)).unwrap();
    metrics.write(&StepRecord { tflop_per_s: f64::NAN, mfu: f64::NAN, ..record(9) }).unwrap();
    assert!(fs::read_to_string(dir.path().join("metrics.jsonl")).unwrap().starts_with(old));
    let back: Vec<StepRecord> = read(dir.path()).unwrap();
    assert_eq!(back.iter().map(|r| r.step).collect::<Vec<_>>(), [7, 8, 9]);
    assert!([&back[0], &back[2]].iter().all(|r| r.mfu.is_nan() && r.tflop_per_s.is_nan()));
    assert_eq!(back[0].images_per_s, 329.0);
    assert_eq!(back[1], record(8));
}

#[test]
fn resuming_cuts_off_later_records_and_a_torn_line_and_keeps_the_rest_byte_for_byte() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("metrics.jsonl");
    let mut metrics = Metrics::open(dir.path(), "run", None).unwrap();
    (1..=3).for_each(|n| metrics.write(&record(5 * n)).unwrap());
    let up_to_15 = fs::read(&path).unwrap();
    metrics.write(&record(20)).unwrap();
    metrics.write(&record(25)).unwrap();
    drop(metrics);
    let torn = [fs::read(&path).unwrap(), br#"{"step":30,"epo"#.to_vec()].concat();
    fs::write(&path, &torn).unwrap();

    // A step between two logged ones.
    let mut metrics = Metrics::open(dir.path(), "another title", Some(17)).unwrap();
    assert_eq!(fs::read(&path).unwrap(), up_to_15);
    metrics.write(&record(20)).unwrap();
    metrics.sync().unwrap();
    let steps: Vec<u64> = read(dir.path()).unwrap().iter().map(|r: &StepRecord| r.step).collect();
    assert_eq!(steps, [5, 10, 15, 20]);

    Metrics::open(dir.path(), "run", Some(20)).unwrap();
    assert_eq!(read::<StepRecord>(dir.path()).unwrap().len(), 4, "nothing later: all is kept");
    Metrics::open(dir.path(), "run", None).unwrap();
    assert_eq!(read::<StepRecord>(dir.path()).unwrap(), [], "a run from step 0 starts anew");
}

#[test]
fn a_journal_cut_anywhere_can_be_read_and_resumed() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("metrics.jsonl");
    let mut metrics = Metrics::open(dir.path(), "run", None).unwrap();
    (1..=3).for_each(|step| metrics.write(&record(step)).unwrap());
    let whole = fs::read(&path).unwrap();
    for length in 0..=whole.len() {
        fs::write(&path, &whole[..length]).unwrap();
        let left = whole[..length].iter().filter(|&&b| b == b'\n').count().saturating_sub(1);
        assert_eq!(read::<StepRecord>(dir.path()).unwrap().len(), left, "at {length} bytes");
        let mut metrics = Metrics::open(dir.path(), "run", Some(2)).unwrap();
        metrics.write(&record(3)).unwrap();
        let steps: Vec<u64> =
            read(dir.path()).unwrap().iter().map(|r: &StepRecord| r.step).collect();
        assert_eq!(steps, [&[1, 2][..left.min(2)], &[3]].concat(), "at {length} bytes");
    }
}

#[test]
fn damage_before_the_resumed_step_is_named_and_left_alone_and_later_damage_is_cut_off() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("metrics.jsonl");
    let mut metrics = Metrics::open(dir.path(), "run", None).unwrap();
    (1..=4).for_each(|step| metrics.write(&record(step)).unwrap());
    let damaged = fs::read_to_string(&path).unwrap().replace("{\"step\":3", "\0\0\0step\":3");
    fs::write(&path, &damaged).unwrap();

    let error = Metrics::open(dir.path(), "run", Some(4)).unwrap_err().to_string();
    assert!(error.contains("metrics.jsonl is damaged: line 4"), "{error}");
    assert!(read::<StepRecord>(dir.path()).is_err());
    assert_eq!(fs::read_to_string(&path).unwrap(), damaged);

    Metrics::open(dir.path(), "run", Some(2)).unwrap();
    assert_eq!(read::<StepRecord>(dir.path()).unwrap().len(), 2);
}

#[test]
fn a_journal_of_another_schema_is_refused_and_left_alone() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("metrics.jsonl");
    for text in ["{\"schema\":\"pixmim-metrics-9\",\"run\":\"x\"}\n", "hello\n"] {
        fs::write(&path, text).unwrap();
        assert!(matches!(Metrics::open(dir.path(), "run", Some(1)), Err(Error::Corrupt { .. })));
        assert!(matches!(read::<StepRecord>(dir.path()), Err(Error::Corrupt { .. })));
        assert_eq!(fs::read_to_string(&path).unwrap(), text);
    }
}

#[test]
fn bad_images_and_notices_follow_the_same_rules() {
    let dir = tempfile::tempdir().unwrap();
    assert_eq!(read::<BadImage>(dir.path()).unwrap(), []);
    let bad = |step| BadImage { step, name: "a\n\"b\".jpg".into(), reason: "no image".into() };
    let mut images = BadImages::open(dir.path(), "run", Some(9)).unwrap();
    images.write(&bad(0)).unwrap();
    images.write(&bad(12)).unwrap();
    assert_eq!(lines(dir.path(), "bad_images.jsonl").len(), 3);
    BadImages::open(dir.path(), "run", Some(9)).unwrap();
    assert_eq!(read::<BadImage>(dir.path()).unwrap(), [bad(0)]);

    let notice = Notice { step: 9, kind: NoticeKind::Resumed, text: "from ckpt".into() };
    Notices::open(dir.path(), "run", None).unwrap().write(&notice).unwrap();
    assert_eq!(
        lines(dir.path(), "notices.jsonl")[1],
        r#"{"step":9,"kind":"resumed","text":"from ckpt"}"#
    );
    assert_eq!(read::<Notice>(dir.path()).unwrap(), [notice]);
}

#[test]
fn a_folder_that_is_not_there_is_one_clear_sentence() {
    let error = Metrics::open(Path::new("/nowhere/at/all"), "run", None).unwrap_err();
    assert!(error.to_string().starts_with("cannot write /nowhere/at/all/metrics.jsonl: "));
    assert_eq!(error.exit_code(), 5);
}
