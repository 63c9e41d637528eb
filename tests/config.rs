//! The configuration: presets, layers, strictness, checks, and its written form.
#![cfg(feature = "train")]
#![expect(clippy::unwrap_used, reason = "a test fails by panicking")]

use std::collections::BTreeSet;
use std::path::PathBuf;

use pixmim::Error;
use pixmim::train::config::{
    Assignment, Auto, Config, Crop, KEYS, Layers, Length, PRESETS, Target, reference,
};
use proptest::prelude::*;

fn preset(name: &str) -> Config {
    Config::preset(name).unwrap()
}

fn assign(layers: &mut Layers, assignments: &[&str]) -> pixmim::Result<()> {
    let assignments: Vec<_> =
        assignments.iter().map(|text| Assignment::parse(text).unwrap()).collect();
    layers.assign(&assignments)
}

/// The preset `demo` with assignments over it.
fn demo_with(assignments: &[&str]) -> pixmim::Result<Config> {
    let mut layers = Layers::new();
    layers.preset("demo")?;
    assign(&mut layers, assignments)?;
    layers.finish()
}

/// The preset `demo` with a text over it.
fn demo_over(text: &str) -> pixmim::Result<Config> {
    let mut layers = Layers::new();
    layers.preset("demo")?;
    layers.toml("my.toml", text)?;
    layers.finish()
}

fn complaint<T: std::fmt::Debug>(result: pixmim::Result<T>) -> String {
    let error = result.unwrap_err();
    assert_eq!(error.exit_code(), 1, "{error}");
    error.to_string()
}

fn names(table: &toml::Table) -> BTreeSet<String> {
    table
        .iter()
        .flat_map(|(section, keys)| {
            keys.as_table().unwrap().keys().map(move |key| format!("{section}.{key}"))
        })
        .collect()
}

#[test]
fn the_table_of_keys_has_every_field_of_the_config() {
    let mut config = preset("demo");
    config.optim.lr = Some(1e-3);
    config.schedule.epochs = Some(1.0);
    let table = toml::Table::try_from(&config).unwrap();
    let keys: BTreeSet<_> = KEYS.iter().map(|key| key.name.to_owned()).collect();
    assert_eq!(keys.len(), KEYS.len(), "a key is listed twice");
    assert_eq!(names(&table), keys);
}

#[test]
fn presets_give_every_key_but_the_switches_of_the_method() {
    let left_to_the_method = ["method.target", "method.crop", "optim.decay_tokens"];
    for (name, text) in PRESETS {
        let given = names(&text.parse().unwrap());
        for key in KEYS {
            let is_either = ["optim.lr", "schedule.steps", "schedule.epochs", "optim.base_lr"];
            let expected = !left_to_the_method.contains(&key.name);
            assert!(
                given.contains(key.name) == expected || is_either.contains(&key.name),
                "{name}: {}",
                key.name
            );
        }
        preset(name).check().unwrap();
    }
}

#[test]
fn the_published_recipe_is_in_the_presets() {
    for name in ["small", "base", "large", "huge", "pixmim-vit-b-300e"] {
        let config = preset(name);
        assert!((config.peak_lr() - 2.4e-3).abs() <= 1e-15, "{name}");
        assert_eq!(config.warmup_steps(313), 12_520, "{name}");
        assert_eq!(config.optim.betas, [0.9, 0.95]);
        assert_eq!((config.optim.weight_decay, config.optim.eps), (0.05, 1e-8));
        assert_eq!((config.optim.clip_grad, config.schedule.min_lr), (0.0, 0.0));
        assert_eq!(config.optim.global_batch, 4096);
        let patches = if name == "huge" { 256 } else { 196 };
        assert_eq!((config.patches(), config.kept_patches()), (patches, patches / 4), "{name}");
        assert_eq!(config.resolved().radius, 40.0);
        assert_eq!(config.resolved().padding, 4);
    }
    assert_eq!(preset("pixmim-vit-b-300e").total_steps(313), 93_900);
    assert_eq!(preset("base").total_steps(313), 250_400);
    assert_eq!(preset("pixmim-vit-b-300e").runtime.seed, 2);
    // D, depth, heads; decoder D, depth, heads (MAE's models_mae.py; ViT-S of PixMIM's research code).
    for (name, sizes) in [
        ("small", [384, 12, 6, 384, 8, 12]),
        ("base", [768, 12, 12, 512, 8, 16]),
        ("large", [1024, 24, 16, 512, 8, 16]),
        ("huge", [1280, 32, 16, 512, 8, 16]),
    ] {
        let m = preset(name).model;
        let found = [m.dim, m.depth, m.heads, m.decoder_dim, m.decoder_depth, m.decoder_heads];
        assert_eq!(found, sizes, "{name}");
    }
}

#[test]
fn auto_scales_the_filter_and_the_padding_with_the_image() {
    for (size, radius, padding) in
        [(64, 80.0 / 7.0, 1), (32, 40.0 / 7.0, 1), (112, 20.0, 2), (448, 80.0, 4)]
    {
        let config = demo_with(&[&format!("model.image_size={size}")]).unwrap();
        let resolved = config.resolved();
        assert!((resolved.radius - radius).abs() <= 1e-12, "{size}: {}", resolved.radius);
        assert_eq!(resolved.padding, padding, "{size}");
        assert!(resolved.data_threads >= 1 && resolved.compute_threads >= 1);
    }
    let given =
        demo_with(&["method.radius=9", "method.padding=0", "data.threads=3", "runtime.threads=5"]);
    let resolved = given.unwrap().resolved();
    assert_eq!(resolved.radius, 9.0);
    assert_eq!((resolved.padding, resolved.data_threads, resolved.compute_threads), (0, 3, 5));
}

#[test]
fn lengths_are_in_epochs_or_updates() {
    assert_eq!(Length::parse("40ep"), Some(Length::Epochs(40.0)));
    assert_eq!(Length::parse("0.5ep").unwrap().steps(313), 157);
    assert_eq!(Length::parse("1000it"), Some(Length::Steps(1000)));
    for text in
        ["", "40", "ep", "it", "-1ep", "-1it", "1.5it", "NaNep", "infep", "1e7ep", "40 ep", "40EP"]
    {
        assert_eq!(Length::parse(text), None, "{text}");
    }
    let config = demo_with(&["schedule.epochs=0.001"]).unwrap();
    assert_eq!(config.total_steps(7), 1, "a run has at least one step");
}

#[test]
fn a_layer_lies_over_the_layers_below_it() {
    let mut layers = Layers::new();
    layers.preset("demo").unwrap();
    assert_eq!(layers.finish().unwrap().optim.weight_decay, 0.05);
    assert_eq!(layers.finish().unwrap().method.target, Target::LowFreq);

    let text = "[optim]\nweight_decay = 1\nclip_grad = 1\neps = 0.1\n[method]\ntarget = 'raw'";
    layers.toml("my.toml", text).unwrap();
    let file = layers.finish().unwrap();
    assert_eq!((file.optim.weight_decay, file.optim.clip_grad, file.optim.eps), (1.0, 1.0, 0.1));
    assert_eq!((file.method.target, file.method.crop), (Target::Raw, Crop::Simple));
    assert_eq!(file.method_name(), "custom");

    let variables = [
        ("PIXMIM_OPTIM__WEIGHT_DECAY", "2"),
        ("PIXMIM_OPTIM__CLIP_GRAD", "2"),
        ("PIXMIM_DATA__PATH", "/photos of mine"),
        ("PIXMIM_METHOD__TARGET", "low_freq"),
        ("PIXMIM_REQUIRE_CUDA", "1"),
        ("HOME", "/root"),
    ];
    layers.environment(variables.map(|(name, value)| (name.into(), value.into()))).unwrap();
    let env = layers.finish().unwrap();
    assert_eq!((env.optim.weight_decay, env.optim.clip_grad, env.optim.eps), (2.0, 2.0, 0.1));
    assert_eq!(env.data.path, PathBuf::from("/photos of mine"));
    assert_eq!(env.method.target, Target::LowFreq);

    layers.method("mae").unwrap();
    let mae = layers.finish().unwrap();
    assert_eq!(
        (mae.method.target, mae.method.crop, mae.optim.decay_tokens, mae.method_name()),
        (Target::Raw, Crop::RandomResized, true, "mae")
    );
    assert_eq!(mae.optim.clip_grad, 2.0);

    assign(&mut layers, &["optim.weight_decay=3", "optim.weight_decay=4", "method.crop=simple"])
        .unwrap();
    let set = layers.finish().unwrap();
    assert_eq!((set.optim.weight_decay, set.optim.clip_grad, set.optim.eps), (4.0, 2.0, 0.1));
    assert_eq!((set.method.target, set.method.crop), (Target::Raw, Crop::Simple));
}

#[test]
fn a_learning_rate_or_a_length_takes_back_its_other_form_from_below() {
    let config = demo_with(&["optim.lr=7e-4", "schedule.epochs=3"]).unwrap();
    assert_eq!((config.optim.lr, config.optim.base_lr), (Some(7e-4), None));
    assert_eq!((config.schedule.steps, config.schedule.epochs), (None, Some(3.0)));
    assert_eq!(config.peak_lr(), 7e-4);
    assert_eq!(config.total_steps(5), 15);

    let both = complaint(demo_with(&["optim.base_lr=1e-3", "optim.lr=1e-3"]));
    assert!(both.contains("both `optim.lr` and `optim.base_lr`"), "{both}");
    let both = complaint(demo_over("[schedule]\nepochs = 1\nsteps = 2"));
    assert_eq!(
        both,
        "my.toml:3:1: gives both `schedule.steps` and `schedule.epochs`; give one of them"
    );
}

#[test]
fn unknown_keys_are_refused_with_their_place_and_the_nearest_name() {
    for (text, expected) in [
        (
            "[optim]\n  globl_batch = 3",
            "my.toml:2:3: unknown key `optim.globl_batch`; did you mean `optim.global_batch`?",
        ),
        ("# é\noptim.LR = 3", "my.toml:2:7: unknown key `optim.LR`; did you mean `optim.lr`?"),
        (
            "[optim]\nepochs = 3",
            "my.toml:2:1: unknown key `optim.epochs`; did you mean `schedule.epochs`?",
        ),
        ("steps = 3", "my.toml:1:1: unknown key `steps`; did you mean `schedule.steps`?"),
        ("[optimizer]\nlr = 3", "my.toml:1:2: unknown key `optimizer`; did you mean `optim`?"),
        ("[zzz]", "my.toml:1:2: unknown key `zzz`; docs/config.md lists all keys"),
        ("optim = 3", "my.toml:1:1: unknown key `optim`"),
        // Two mistakes: the one that a reader meets first.
        ("[schedule]\nzz = 1\n[data]\nzz = 1", "my.toml:2:1: unknown key `schedule.zz`"),
    ] {
        let why = complaint(demo_over(text));
        assert!(why.starts_with(expected), "{why}");
    }
    let why = complaint(demo_with(&["optim.momentum=1"]));
    assert!(why.starts_with("--set optim.momentum=1: unknown key `optim.momentum`"), "{why}");
    let mut layers = Layers::new();
    let why = complaint(layers.environment([("PIXMIM_OPTIM__LRR".into(), "1".into())]));
    assert_eq!(why, "PIXMIM_OPTIM__LRR: unknown key `optim.lrr`; did you mean `optim.lr`?");
    assert!(complaint(layers.preset("basse")).contains("did you mean `base`?"));
    assert!(complaint(layers.method("beit")).contains("none of pixmim, mae"));
    assert!(complaint(Assignment::parse("optim.lr")).contains("--set optim.lr=1e-3"));
}

#[test]
fn values_of_a_wrong_type_or_range_are_refused_with_what_is_expected() {
    for (text, expected) in [
        (
            "[model]\ndim = \"wide\"",
            "my.toml:2:1: `model.dim` is \"wide\", expected a whole number from 4 to 16384",
        ),
        ("[model]\ndim = 1.5", "`model.dim` is 1.5, expected a whole number"),
        ("[model]\ndim = -8", "`model.dim` is -8, expected a whole number from 4"),
        ("[model]\ndim = 99999999999", "expected a whole number from 4 to 16384"),
        ("[model]\ndim = 99999999999999999999", "my.toml:2:1:"),
        ("[model.dim]\na = 1", "`model.dim` is { a = 1 }, expected a whole number"),
        ("[method]\nnorm_pix = 1", "`method.norm_pix` is 1, expected true or false"),
        (
            "[method]\ntarget = 'low'",
            "`method.target` is \"low\", expected \"low_freq\" or \"raw\"",
        ),
        ("[method]\nradius = 'big'", "expected a number above 0 to 8192, or \"auto\""),
        ("[method]\nradius = 0", "`method.radius` is 0, expected a number above 0"),
        ("[method]\nmask_ratio = 1.0", "expected a number above 0 below 1"),
        ("[method]\nmask_ratio = nan", "`method.mask_ratio` is nan, expected a number"),
        (
            "[data]\nmean = [123.675, 116.28, 103.53]",
            "expected three numbers [r, g, b], each from 0 to 1",
        ),
        ("[data]\nstd = [0.2, 0.2]", "`data.std` is [0.2, 0.2], expected three numbers"),
        ("[data]\nstd = [0.2, 0.2, 0.0]", "each from 0.001 to 1"),
        ("[data]\nstd = [[0.2], 0.2, 0.2]", "expected three numbers"),
        ("[data]\npath = 7", "`data.path` is 7, expected a path"),
        ("[optim]\nbetas = [0.9, 1.0]", "expected two numbers [a, b], each from 0 below 1"),
        ("[optim]\nlr = -1e-3", "expected a number above 0 to 10"),
        ("[optim]\nlr = inf", "expected a number above 0 to 10"),
        ("[optim]\nclip_grad = -1", "expected a number from 0"),
        ("[optim]\nglobal_batch = 0", "expected a whole number from 1"),
        ("[schedule]\nwarmup = 40", "`schedule.warmup` is 40, expected epochs like \"40ep\""),
        (
            "[schedule]\nwarmup = '40 epochs'",
            "expected epochs like \"40ep\" or updates like \"1000it\"",
        ),
        ("[schedule]\nsteps = 1.5", "`schedule.steps` is 1.5, expected a whole number"),
        ("[runtime]\ndevice = 'gpu'", "expected \"auto\", \"cpu\", \"cuda\" or \"simt\""),
        ("[runtime]\nseed = -1", "expected a whole number from 0"),
        ("[runtime]\nthreads = 0", "expected a whole number from 1 to 1024, or \"auto\""),
        ("[log]\nevery = 0", "expected a whole number from 1"),
        ("[optim\nlr = 1", "my.toml:1:7:"),
        ("[optim]\nlr = 1\nlr = 2", "my.toml:3:1: duplicate key"),
        ("\u{0}", "my.toml:1:"),
    ] {
        let why = complaint(demo_over(text));
        assert!(why.starts_with("my.toml:") && why.contains(expected), "{text:?}: {why}");
    }
}

#[test]
fn values_that_do_not_fit_together_are_refused_with_a_cure() {
    for (assignments, expected) in [
        (
            &["optim.micro_batch=48"][..],
            "--set optim.micro_batch=48: `optim.micro_batch` is 48 and does not divide optim.global_batch 64; use 32 or 64",
        ),
        (
            &["optim.global_batch=48"],
            "--set optim.global_batch=48: `optim.micro_batch` is 64 and does not divide optim.global_batch 48; use 48",
        ),
        (&["model.image_size=65"], "is 65 and not a multiple of model.patch_size 8; use 64 or 72"),
        (&["model.patch_size=72"], "is 72, larger than model.image_size 64"),
        (&["model.heads=5"], "`model.heads` is 5 and does not divide model.dim 192; use 4 or 6"),
        (&["model.decoder_heads=7"], "does not divide model.decoder_dim 96; use 6 or 8"),
        (&["model.dim=198"], "`model.dim` is 198 and not divisible by 4"),
        (&["model.decoder_dim=97"], "use 96 or 100"),
        (&["model.patch_size=64"], "the image is a single patch"),
        (&["model.image_size=4096", "model.patch_size=2"], "has 4194304 patches, more than 65536"),
        (&["method.mask_ratio=0.999"], "keeps none of 64 patches; use at most 0.9843"),
        (&["method.mask_ratio=1e-20"], "masks none of 64 patches"),
        (&["method.mask_block=9"], "is 9, larger than the grid of 8 x 8 patches"),
        (&["method.padding=64"], "must be narrower than model.image_size 64"),
        (&["method.crop_scale=[0.9, 0.2]"], "put the smaller share first"),
        (
            &["schedule.min_lr=0.01"],
            "`schedule.min_lr` is 1e-2, over the peak learning rate of 2.5e-3",
        ),
    ] {
        let why = complaint(demo_with(assignments));
        assert!(why.starts_with("--set ") && why.contains(expected), "{assignments:?}: {why}");
    }
    for assignments in [
        &["method.mask_ratio=0.9843"][..],
        &["method.mask_block=3"],
        &["model.heads=4"],
        &["method.padding=63"],
        &["optim.global_batch=48", "optim.micro_batch=16"],
        &["schedule.steps=3"],
    ] {
        demo_with(assignments).unwrap();
    }
}

#[test]
fn check_judges_configs_that_were_not_read_from_a_text() {
    let refuse = |change: fn(&mut Config), name: &str| {
        let mut config = preset("tiny");
        change(&mut config);
        match config.check().unwrap_err() {
            Error::Invalid { name: found, .. } => assert_eq!(found, name),
            other => panic!("{other}"),
        }
    };
    refuse(|config| config.model.heads = 0, "model.heads");
    refuse(|config| config.model.patch_size = 0, "model.patch_size");
    refuse(|config| config.optim.micro_batch = 0, "optim.micro_batch");
    refuse(|config| config.optim.lr = Some(1e-3), "optim.lr");
    refuse(|config| config.optim.base_lr = None, "optim.lr");
    refuse(|config| config.schedule.steps = None, "schedule.steps");
    refuse(|config| config.schedule.epochs = Some(1.0), "schedule.steps");
    refuse(|config| config.schedule.warmup = "soon".into(), "schedule.warmup");
    refuse(|config| config.runtime.device = "tpu".into(), "runtime.device");
    refuse(|config| config.runtime.seed = u64::MAX, "runtime.seed");
    refuse(|config| config.method.radius = Auto::Value(f64::NAN), "method.radius");
    refuse(|config| config.data.std[1] = f64::NAN, "data.std");
    refuse(|config| config.optim.betas[0] = 1.0, "optim.betas");
    #[cfg(unix)]
    refuse(
        |config| {
            use std::os::unix::ffi::OsStrExt as _;
            config.data.path = std::ffi::OsStr::from_bytes(b"\xff").into();
        },
        "data.path",
    );
}

#[test]
fn a_written_config_reads_back_equal() {
    for (name, _) in PRESETS {
        let config = preset(name);
        let text = config.to_toml().unwrap();
        assert_eq!(Config::parse("config.toml", &text).unwrap(), config, "{name}");
    }
    let text = preset("demo").to_toml().unwrap();
    assert!(text.contains("cycles per image (auto: 11.43)\nradius = \"auto\"\n"), "{text}");
    assert!(text.contains("mean = [0.485, 0.456, 0.406]\n"), "{text}");
    assert!(text.contains("eps = 1e-8\n"), "{text}");
    let comments = text.lines().filter(|line| line.starts_with('#')).count();
    let keys = text.lines().filter(|line| line.contains(" = ")).count();
    assert_eq!((comments, keys), (KEYS.len() - 2 + 1, KEYS.len() - 2));
}

proptest! {
    #[test]
    fn any_sound_config_reads_back_equal(
        lr in 1e-12..10.0f64,
        mean in prop::array::uniform3(0.0..=1.0f64),
        scale in 0.5..=1.0f64,
        path in any::<String>(),
        seed in 0..=i64::MAX as u64,
        radius in prop::option::of(1e-9..8192.0f64),
        epochs in prop::option::of(1e-9..1e6f64),
    ) {
        let mut config = preset("tiny");
        config.optim.base_lr = None;
        config.optim.lr = Some(lr);
        config.data.mean = mean;
        config.method.crop_scale = [scale / 3.0, scale];
        config.data.path = path.into();
        config.runtime.seed = seed;
        if let Some(radius) = radius {
            config.method.radius = Auto::Value(radius);
        }
        if epochs.is_some() {
            config.schedule.steps = None;
            config.schedule.epochs = epochs;
        }
        let text = config.to_toml().unwrap();
        prop_assert_eq!(Config::parse("config.toml", &text).unwrap(), config);
    }

    #[test]
    fn a_damaged_config_is_read_or_refused_never_a_panic(
        offset in 0usize..1400,
        damage in prop_oneof![any::<String>(), "[\\[\\]\"'=.,{}#\n0-9a-z_-]{0,12}"],
        cut in 0usize..20,
    ) {
        let text = PRESETS[0].1;
        let start = offset.min(text.len());
        let end = (start + cut).min(text.len());
        let damaged = format!("{}{damage}{}", &text[..start], &text[end..]);
        match Config::parse("my.toml", &damaged) {
            Ok(config) => config.check().unwrap(),
            Err(error) => prop_assert_eq!(error.exit_code(), 1),
        }
    }
}

#[test]
fn a_config_that_lacks_keys_says_which() {
    let why = complaint(Config::parse("my.toml", "[optim]\nlr = 1e-3"));
    assert!(why.contains("lacks model.image_size, model.patch_size"), "{why}");
    assert!(why.ends_with("add them, or give --preset"), "{why}");
    let text = preset("demo").to_toml().unwrap().replace("steps = 600\n", "");
    let why = complaint(Config::parse("my.toml", &text));
    assert!(why.contains("is not given, nor is `schedule.epochs`"), "{why}");
}

#[test]
fn config_files_are_limited_text_files() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("c.toml");
    let sound = preset("demo").to_toml().unwrap();
    std::fs::write(&path, &sound).unwrap();
    assert_eq!(Config::load(&path).unwrap(), preset("demo"));

    let pad = |bytes: usize| format!("{sound}#{}", "x".repeat(bytes - sound.len() - 1));
    std::fs::write(&path, pad(1 << 20)).unwrap();
    Config::load(&path).unwrap();
    std::fs::write(&path, pad((1 << 20) + 1)).unwrap();
    assert!(complaint(Config::load(&path)).ends_with("has more than 1 MiB and cannot be a config"));
    std::fs::write(&path, b"\xff\xfe").unwrap();
    assert!(complaint(Config::load(&path)).ends_with("is not UTF-8 text"));
    assert!(complaint(Config::load(&folder.path().join("no.toml"))).contains("no such file"));
    assert_eq!(Config::load(folder.path()).unwrap_err().exit_code(), 5);
}

/// `PIXMIM_BLESS=1` writes the file anew.
#[test]
fn the_reference_is_in_step_with_the_keys() {
    let path = concat!(env!("CARGO_MANIFEST_DIR"), "/docs/config.md");
    let expected = reference().unwrap();
    if std::env::var_os("PIXMIM_BLESS").is_some() {
        std::fs::write(path, &expected).unwrap();
    }
    let found = std::fs::read_to_string(path).unwrap();
    assert!(found == expected, "docs/config.md is behind; run this test with PIXMIM_BLESS=1");
    for key in KEYS {
        let explained = key.explain().unwrap();
        assert!(explained.contains(key.meaning) && explained.contains("preset   demo: "));
    }
}
