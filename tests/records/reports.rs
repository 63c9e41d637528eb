//! The HTML report.

use std::fs;

use pixmim::train::metrics::{BadImage, Notice, NoticeKind};
use pixmim::train::report::{self, Report};
use pixmim::train::{StepRecord, timeline};

use crate::{pictures, record};

const EVIL: &str = "</pre><script>alert('x')</script> & \"y\"";

fn page(report: &Report<'_>) -> String {
    let dir = tempfile::tempdir().unwrap();
    let path = report::write(dir.path(), report).unwrap();
    assert_eq!(path, dir.path().join("report.html"));
    assert_eq!(fs::read_dir(dir.path()).unwrap().count(), 1, "nothing is left aside");
    fs::read_to_string(path).unwrap()
}

fn empty() -> Report<'static> {
    Report {
        title: "PixMIM on photos",
        status: "running",
        steps: 0,
        planned: 1000,
        loss: f64::NAN,
        images_per_s: f64::NAN,
        mfu: f64::NAN,
        records: &[],
        pictures: &[],
        timeline: None,
        profile: None,
        notices: &[],
        bad_images: &[],
        facts: &[],
        config: "",
        environment: &[],
    }
}

/// Every tag is closed in its turn; attributes are quoted and hold no tags.
fn assert_well_formed(page: &str) {
    let mut open: Vec<&str> = Vec::new();
    let mut rest = page.split_once("<html").map(|(_, rest)| rest).unwrap();
    while let Some(start) = rest.find('<') {
        let end = start + rest[start..].find('>').unwrap();
        let tag = &rest[start + 1..end];
        assert_eq!(tag.matches('"').count() % 2, 0, "<{tag}>");
        let name = tag.split([' ', '/']).find(|part| !part.is_empty()).unwrap();
        if tag.starts_with('/') {
            if name != "html" {
                assert_eq!(open.pop(), Some(name));
            }
        } else if !tag.ends_with('/') && !matches!(name, "meta" | "img") {
            open.push(name);
        }
        rest = &rest[end + 1..];
    }
    assert_eq!(open, Vec::<&str>::new());
}

#[test]
fn the_report_holds_all_it_was_given_and_needs_nothing_else() {
    let dir = tempfile::tempdir().unwrap();
    pictures::write_pictures(dir.path(), 12, 2);
    let pictures = timeline::list(dir.path()).unwrap();
    let strip = timeline::write(dir.path(), &pictures, 2).unwrap();
    let records: Vec<StepRecord> = (1..=4000).map(record).collect();
    let notices = [
        Notice { step: 1234, kind: NoticeKind::Skipped, text: "loss is not finite".into() },
        Notice { step: 2000, kind: NoticeKind::Resumed, text: "from step-00002000".into() },
    ];
    let bad_images = [BadImage { step: 3, name: "cats/1.jpg".into(), reason: "truncated".into() }];
    let page = page(&Report {
        steps: 4000,
        planned: 4000,
        loss: 0.28714,
        images_per_s: 1234.5,
        mfu: 0.4321,
        records: &records,
        pictures: &pictures,
        timeline: strip.as_deref(),
        notices: &notices,
        bad_images: &bad_images,
        facts: &[("device", "cpu (2 cores)".into())],
        config: "[model]\nimage_size = 64",
        environment: &[("rustc", "1.95".into())],
        ..empty()
    });
    assert_well_formed(&page);
    for text in [
        "step 4,000 of 4,000",
        "0.2871",
        ">1,234<",
        ">43.2<",
        "cats/1.jpg",
        "loss is not finite",
        "from step-00002000",
        "cpu (2 cores)",
        "image_size = 64",
        "prefers-color-scheme: dark",
        "@media print",
    ] {
        assert!(page.contains(text), "{text:?} is missing");
    }
    assert_eq!(page.matches("<svg").count(), 7);
    assert_eq!(page.matches("class=\"skipped\"").count(), 6, "not in the pictures' chart");
    assert_eq!(page.matches("src=\"data:image/png;base64,iVBORw0KGgo").count(), 8 + 1);
    assert_eq!(page.matches("src=").count(), 8 + 1, "all sources are inside");
    for outside in ["<script", "<link", "http:", "https:", "url(", "@import", "href"] {
        assert!(!page.contains(outside), "{outside:?} reaches out");
    }
    let curves = page.split("points=\"").skip(1).map(|rest| rest.split_once('"').unwrap().0);
    assert!(curves.into_iter().all(|points| points.split(' ').count() <= 1000));
}

#[test]
fn text_from_outside_stays_text() {
    let evil = EVIL.to_owned();
    let page = page(&Report {
        title: EVIL,
        status: EVIL,
        notices: &[Notice { step: 1, kind: NoticeKind::Warning, text: evil.clone() }],
        bad_images: &[BadImage { step: 1, name: evil.clone(), reason: evil.clone() }],
        facts: &[(EVIL, evil.clone())],
        config: EVIL,
        environment: &[(EVIL, evil.clone())],
        ..empty()
    });
    assert_well_formed(&page);
    assert!(!page.contains("<script>"));
    assert_eq!(page.matches("&lt;script&gt;alert(&#39;x&#39;)").count(), 2 + 1 + 1 + 2 + 2 + 1 + 2);
}

#[test]
fn a_run_that_has_done_nothing_yet_has_a_report() {
    let page = page(&empty());
    assert_well_formed(&page);
    assert!(page.contains("no values yet") && page.contains("n/a"));
    assert!(!page.contains("NaN"));
}

#[test]
fn a_picture_that_vanished_is_named() {
    let dir = tempfile::tempdir().unwrap();
    pictures::write_pictures(dir.path(), 2, 1);
    let pictures = timeline::list(dir.path()).unwrap();
    fs::remove_file(&pictures[0].path).unwrap();
    let error = report::write(dir.path(), &Report { pictures: &pictures, ..empty() }).unwrap_err();
    assert!(error.to_string().contains("step-00000000.png"), "{error}");
}

#[test]
fn large_pictures_are_shown_fewer_so_that_a_browser_can_open_the_page() {
    let dir = tempfile::tempdir().unwrap();
    pictures::write_pictures(dir.path(), 12, 1);
    let pictures = timeline::list(dir.path()).unwrap();
    for picture in &pictures {
        fs::OpenOptions::new().write(true).open(&picture.path).unwrap().set_len(3 << 20).unwrap();
    }
    let page = page(&Report { pictures: &pictures, ..empty() });
    assert_eq!(page.matches("<img").count(), 5, "five of 3 MiB are within 16 MiB, six are not");
    assert!(page.contains("5 of 12") && page.contains("step 0 ") && page.contains("step 55 "));
}
