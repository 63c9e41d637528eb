//! The number of threads changes no bit.

use std::path::Path;

use pixmim::train::config::{Auto, Config};
use pixmim::train::metrics;
use tempfile::tempdir;

use crate::{assert_same_run, photos, tiny, train_anew};

/// 64 patches and widths large enough for matrix products to be split among threads.
fn middling(data: &Path, out: &Path) -> Config {
    let mut config = tiny(data, out);
    config.model.image_size = 32;
    config.model.dim = 96;
    config.model.decoder_dim = 48;
    config.model.decoder_heads = 3;
    config.optim.global_batch = 12;
    config.optim.micro_batch = 6;
    config.schedule.steps = Some(20);
    config.log.every = 5;
    config.log.picture_every = 0;
    config
}

fn assert_threads_change_nothing(precision: &str) {
    let (data, runs) = (photos(29), tempdir().unwrap());
    let run = |compute: usize, decode: usize| {
        let out = runs.path().join(format!("{compute}-{decode}"));
        let mut config = middling(data.path(), &out);
        config.runtime.precision = precision.into();
        config.runtime.threads = Auto::Value(compute);
        config.data.threads = Auto::Value(decode);
        train_anew(&config);
        out
    };
    let alone = run(1, 1);
    for (compute, decode) in [(2, 1), (4, 3), (1, 3)] {
        let what = format!("{precision}, {compute} compute and {decode} data threads");
        assert_same_run(&what, &alone, &run(compute, decode), 20);
    }
    let losses: Vec<_> = metrics::read::<pixmim::train::StepRecord>(&alone)
        .unwrap()
        .iter()
        .map(|r| r.loss)
        .collect();
    assert!(losses[3] < 0.98 * losses[0], "the network does not learn: {losses:?}");
}

#[test]
fn f32_products_give_the_same_bits_on_any_number_of_threads() {
    assert_threads_change_nothing("f32");
}

#[test]
fn bf16_products_give_the_same_bits_on_any_number_of_threads() {
    assert_threads_change_nothing("bf16");
}

#[test]
fn precision_and_seed_do_change_bits() {
    let (data, runs) = (photos(16), tempdir().unwrap());
    let run = |name: &str, change: &dyn Fn(&mut Config)| {
        let out = runs.path().join(name);
        let mut config = tiny(data.path(), &out);
        config.schedule.steps = Some(3);
        change(&mut config);
        train_anew(&config);
        crate::tensors(&out, 3)
    };
    let f32 = run("f32", &|_| {});
    assert!(f32 == run("again", &|_| {}));
    assert!(f32 != run("bf16", &|config| config.runtime.precision = "bf16".into()));
    assert!(f32 != run("seed", &|config| config.runtime.seed = 1));
}
