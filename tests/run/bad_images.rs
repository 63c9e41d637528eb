//! Images that cannot be read are told, counted, replaced, and too many of them end the run.

use std::fs;
use std::path::Path;

use pixmim::train::config::{Auto, Config};
use pixmim::train::metrics::{self, BadImage};
use pixmim::train::run::Options;
use tempfile::{TempDir, tempdir};

use crate::{
    Said, assert_same_run, checkpoint, go_on, metrics_of, photo, photos, tiny, train, train_anew,
};

/// 24 files: one is no image, one is cut off, one is empty.
fn spoilt() -> TempDir {
    let data = photos(24);
    fs::write(photo(data.path(), 3), "not an image").unwrap();
    let cut = photo(data.path(), 11);
    let bytes = fs::read(&cut).unwrap();
    fs::write(&cut, &bytes[..bytes.len() / 2]).unwrap();
    fs::write(photo(data.path(), 20), "").unwrap();
    data
}

const BAD: [&str; 3] = ["class_0/003.png", "class_2/011.png", "class_2/020.png"];

fn config(data: &Path, out: &Path) -> Config {
    let mut config = tiny(data, out);
    config.data.max_bad_share = 3.0 / 24.0;
    config
}

#[test]
fn bad_images_are_told_once_and_replaced_alike_whatever_the_threads() {
    let (data, runs) = (spoilt(), tempdir().unwrap());
    let run = |name: &str, threads: usize| {
        let out = runs.path().join(name);
        let mut config = config(data.path(), &out);
        config.data.threads = Auto::Value(threads);
        let mut said = Said::default();
        let summary = train(&config, &Options::default(), None, &mut said).unwrap();
        assert_eq!(summary.steps, 10);
        for name in BAD {
            let told = said.warnings.iter().filter(|text| text.contains(name)).count();
            assert_eq!(told, 1, "{name} in {:?}", said.warnings);
        }
        out
    };
    let alone = run("1", 1);
    assert_same_run("3 data threads", &alone, &run("3", 3), 10);
    let mut listed: Vec<_> = metrics::read::<BadImage>(&alone).unwrap();
    listed.sort_by(|a, b| a.name.cmp(&b.name));
    assert_eq!(listed.iter().map(|bad| bad.name.as_str()).collect::<Vec<_>>(), BAD);
    assert!(listed.iter().all(|bad| !bad.reason.is_empty() && bad.step < 3), "{listed:?}");
    let report = fs::read_to_string(alone.join("report.html")).unwrap();
    assert!(BAD.iter().all(|name| report.contains(name)));
}

#[test]
fn a_run_over_bad_images_can_be_interrupted_anywhere() {
    let (data, runs) = (spoilt(), tempdir().unwrap());
    let whole = runs.path().join("whole");
    train_anew(&config(data.path(), &whole));
    for stop_after in 0..5 {
        let out = runs.path().join(stop_after.to_string());
        let config = config(data.path(), &out);
        let options = Options::default();
        train(&config, &options, Some(stop_after), &mut Said::default()).unwrap();
        go_on(&config, None);
        assert_same_run(&format!("stopped after {stop_after}"), &whole, &out, 10);
    }
}

#[test]
fn more_bad_images_than_allowed_end_the_run_which_keeps_its_last_step() {
    let (data, runs) = (spoilt(), tempdir().unwrap());
    let out = runs.path().join("run");
    let mut config = config(data.path(), &out);
    config.data.max_bad_share = 2.0 / 24.0;
    let error = train(&config, &Options::default(), None, &mut Said::default()).unwrap_err();
    assert_eq!(error.exit_code(), 4, "{error}");
    let text = error.to_string();
    assert!(text.contains("3 unreadable images of 24 (12.50 %)"), "{text}");
    assert!(BAD.iter().all(|name| text.contains(name)), "{text}");
    let steps = metrics_of(&out).len() as u64;
    assert!(steps < 3, "found within the first epoch");
    assert!(checkpoint(&out, steps).is_dir(), "the last finished step is kept");

    // The images repaired, it goes on.
    let repaired = photos(24);
    config.data.path = repaired.path().to_owned();
    assert_eq!(go_on(&config, None).steps, 10);
}

#[test]
fn a_folder_of_bad_images_alone_is_refused() {
    let (data, runs) = (photos(9), tempdir().unwrap());
    for i in 0..9 {
        fs::write(photo(data.path(), i), "no").unwrap();
    }
    let mut config = tiny(data.path(), &runs.path().join("run"));
    config.data.max_bad_share = 1.0;
    let error = train(&config, &Options::default(), None, &mut Said::default()).unwrap_err();
    assert_eq!(error.exit_code(), 4, "{error}");
    assert!(error.to_string().contains("9 unreadable images of 9"), "{error}");
}
