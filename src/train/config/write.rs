//! A config as text: TOML with a comment on each key, and the reference in `docs/config.md`.

use std::fmt::Write as _;

use toml::Table;

use super::keys::{KEYS, Key};
use super::{Config, PRESETS};
use crate::{Error, Result};

impl Key {
    /// What there is to say about the key, in a few lines, with its value in each preset.
    ///
    /// # Errors
    /// None for presets that parse, as a test holds them to.
    pub fn explain(&self) -> Result<String> {
        let mut text = format!("{}: {}\n  takes    {}\n", self.name, self.meaning, self.kind);
        if !self.note.is_empty() {
            let _ = writeln!(text, "  note     {}", self.note);
        }
        for (name, _) in PRESETS {
            let table = to_table(&Config::preset(name)?)?;
            let value = self.of(&table).map_or_else(|| "-".into(), |value| self.kind.show(value));
            let _ = writeln!(text, "  preset   {name}: {value}");
        }
        Ok(text)
    }
}

/// The config as a table of tables.
pub(super) fn to_table(config: &Config) -> Result<Table> {
    Table::try_from(config)
        .map_err(|error| Error::invalid("config", format!("has no form in TOML: {error}")))
}

/// See [`Config::to_toml`].
pub(super) fn to_toml(config: &Config) -> Result<String> {
    let table = to_table(config)?;
    let resolved = config.resolved();
    let mut text = String::from("# Every key is explained in docs/config.md.\n");
    let mut section = "";
    for key in KEYS {
        let Some(value) = key.of(&table) else { continue };
        let (in_section, name) = key.split();
        if in_section != section {
            section = in_section;
            let _ = write!(text, "\n[{section}]\n");
        }
        let _ = write!(text, "# {}", key.meaning);
        // Threads are left out: they are another machine's when the run goes on there.
        let auto = match key.name {
            "method.radius" => Some(format!("{:.2}", resolved.radius)),
            "method.padding" => Some(resolved.padding.to_string()),
            _ => None,
        };
        if let (Some("auto"), Some(auto)) = (value.as_str(), auto) {
            let _ = write!(text, " (auto: {auto})");
        }
        let _ = writeln!(text, "\n{name} = {}", key.kind.show(value));
    }
    Ok(text)
}

const REFERENCE_HEAD: &str = "# Configuration

<!-- Generated from src/train/config/keys.rs; `PIXMIM_BLESS=1 cargo test --release --test config` writes it anew. -->

A config is TOML. It is put together from layers; each is laid over the one before:

1. the switches of method `pixmim`;
2. the preset (`--preset`, a file of `configs/`; `demo` if none is given), or, when a run is resumed, the
   `config.toml` of the run, with a preset over it only if one is given again;
3. `--config FILE`: any part of a config;
4. the environment: `PIXMIM_OPTIM__LR=1e-3` sets `optim.lr` (upper case, two underscores for the dot);
5. `--method pixmim|mae`: the three switches in which the methods differ;
6. `--set optim.lr=1e-3` and options like `--steps`, which are short for `--set schedule.steps=`. The last one counts.

`optim.lr` and `optim.base_lr` exclude each other, as do `schedule.steps` and `schedule.epochs`: a layer that gives one
takes back the other from the layers below. An unknown key, a value of the wrong type or out of range, and values that do
not fit together are errors that name the place, and the exit code is 1. A config file has at most 1 MiB.

| switch | `pixmim` | `mae` |
|---|---|---|
| `method.target` | `\"low_freq\"` | `\"raw\"` |
| `method.crop` | `\"simple\"` | `\"random_resized\"` |
| `optim.decay_tokens` | `false` | `true` |
";

/// The text of `docs/config.md`.
///
/// # Errors
/// None for presets that parse, as a test holds them to.
pub fn reference() -> Result<String> {
    let mut text = String::from(REFERENCE_HEAD);
    let mut section = "";
    for key in KEYS {
        let (in_section, name) = key.split();
        if in_section != section {
            section = in_section;
            let _ = write!(
                text,
                "\n## [{section}]\n\n| key | takes | meaning | note |\n|---|---|---|---|\n"
            );
        }
        let _ = writeln!(text, "| `{name}` | {} | {} | {} |", key.kind, key.meaning, key.note);
    }

    let presets: Vec<_> =
        PRESETS.iter().map(|(name, _)| to_table(&Config::preset(name)?)).collect::<Result<_>>()?;
    text.push_str("\n## Presets\n\nKeys in which presets differ.\n\n| key |");
    for (name, _) in PRESETS {
        let _ = write!(text, " {name} |");
    }
    let _ = writeln!(text, "\n|---|{}", "---|".repeat(PRESETS.len()));
    for key in KEYS {
        let values: Vec<_> = presets.iter().map(|preset| key.of(preset)).collect();
        if values.windows(2).all(|two| two[0] == two[1]) {
            continue;
        }
        let _ = write!(text, "| `{}` |", key.name);
        for value in values {
            let _ = write!(text, " {} |", value.map_or("-".into(), |value| key.kind.show(value)));
        }
        text.push('\n');
    }
    Ok(text)
}
