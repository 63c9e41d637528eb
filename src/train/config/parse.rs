//! Reading a config in layers: strict about keys and types, with the place of every mistake.

use std::collections::BTreeMap;
use std::fs::File;
use std::io::Read as _;
use std::path::Path;

use serde::Deserialize as _;
use toml::de::{DeTable, DeValue, ValueDeserializer};
use toml::{Spanned, Table, Value};

use super::keys::{KEYS, Key};
use super::{Config, METHODS, PRESETS};
use crate::{Error, Result};

/// Largest config file.
const MAX_BYTES: u64 = 1 << 20;
/// Least Jaro-Winkler similarity of a name that is worth a "did you mean".
const SIMILAR: f64 = 0.8;
/// Two ways to say one thing: a layer that gives one takes back the other.
const EITHER: [[&str; 2]; 2] =
    [["optim.lr", "optim.base_lr"], ["schedule.steps", "schedule.epochs"]];

/// A config in the making: values laid over each other, each with the place it comes from.
#[derive(Clone, Debug, Default)]
pub struct Layers {
    settings: BTreeMap<&'static str, Setting>,
    count: usize,
}

#[derive(Clone, Debug)]
struct Setting {
    value: Value,
    place: String,
    layer: usize,
}

/// One value given as text, on a command line or in the environment.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Assignment {
    /// Where it was given, for errors: `--set optim.lr=1`, `--steps`.
    pub place: String,
    /// The key: `optim.lr`.
    pub key: String,
    /// The value; texts need no quotes.
    pub value: String,
}

impl Assignment {
    /// Takes `a.b=c` apart, the argument of `--set`.
    ///
    /// # Errors
    /// [`Error::Config`] if there is no `=`.
    pub fn parse(text: &str) -> Result<Self> {
        let place = format!("--set {text}");
        let Some((key, value)) = text.split_once('=') else {
            return Err(Error::config(place, "has no `=`; write --set optim.lr=1e-3"));
        };
        Ok(Self { place, key: key.trim().to_owned(), value: value.trim().to_owned() })
    }
}

impl Layers {
    /// No layer yet. What no layer gives of the switches of a method is PixMIM's.
    #[must_use]
    pub fn new() -> Self {
        Self::default()
    }

    /// Lays a preset over what is there.
    ///
    /// # Errors
    /// [`Error::Config`] for an unknown name.
    pub fn preset(&mut self, name: &str) -> Result<()> {
        let Some((_, text)) = PRESETS.iter().find(|(preset, _)| *preset == name) else {
            let why = not_among(name, PRESETS.iter().map(|(preset, _)| *preset));
            return Err(Error::config("--preset", why));
        };
        self.toml(&format!("configs/{name}.toml"), text)
    }

    /// Lays a config file over what is there; it may give any part of the keys.
    ///
    /// # Errors
    /// As [`Layers::toml`]; [`Error::Config`] if there is no such file, or it has more than 1 MiB;
    /// [`Error::Io`] if it cannot be read.
    pub fn file(&mut self, path: &Path) -> Result<()> {
        let place = path.display().to_string();
        let mut bytes = Vec::new();
        let read =
            File::open(path).and_then(|file| file.take(MAX_BYTES + 1).read_to_end(&mut bytes));
        match read {
            Ok(_) => {}
            Err(error) if error.kind() == std::io::ErrorKind::NotFound => {
                return Err(Error::config(place, "no such file; check --config"));
            }
            Err(error) => return Err(Error::io("read", path)(error)),
        }
        if bytes.len() as u64 > MAX_BYTES {
            return Err(Error::config(place, "has more than 1 MiB and cannot be a config"));
        }
        match String::from_utf8(bytes) {
            Ok(text) => self.toml(&place, &text),
            Err(_) => Err(Error::config(place, "is not UTF-8 text")),
        }
    }

    /// Lays the text of a config over what is there; it may give any part of the keys. `place` names
    /// the text in errors.
    ///
    /// # Errors
    /// [`Error::Config`] with line and column for text that is not TOML, an unknown key, a value of
    /// the wrong type or out of range, and for two values that exclude each other.
    pub fn toml(&mut self, place: &str, text: &str) -> Result<()> {
        let at = |offset: usize| {
            let before = text.get(..offset).unwrap_or(text);
            let line = before.matches('\n').count() + 1;
            let column = before.rsplit('\n').next().unwrap_or_default().chars().count() + 1;
            format!("{place}:{line}:{column}")
        };
        let root = DeTable::parse(text).map_err(|error| {
            let why = error.message().lines().collect::<Vec<_>>().join("; ");
            Error::config(at(error.span().map_or(0, |span| span.start)), why)
        })?;

        let mut found = Vec::new();
        for (section, value) in root.into_inner() {
            let offset = section.span().start;
            let section = section.into_inner();
            match value.into_inner() {
                DeValue::Table(keys) if is_section(&section) => {
                    for (name, value) in keys {
                        let offset = name.span().start;
                        found.push((offset, format!("{section}.{}", name.get_ref()), Some(value)));
                    }
                }
                _ => found.push((offset, section.into_owned(), None)),
            }
        }
        // The parser sorts keys by name; mistakes are reported in the order of the text.
        found.sort_by_key(|(offset, ..)| *offset);

        let mut settings = Vec::new();
        for (offset, name, value) in found {
            let place = at(offset);
            let key = Key::find(&place, &name)?;
            let value = value.ok_or_else(|| unknown(&place, &name))?;
            let value = read(value).map_err(|why| Error::config(&place, why))?;
            settings.push(setting(key, value, place)?);
        }
        self.lay(settings)
    }

    /// Lays the variables `PIXMIM_SECTION__KEY` over what is there; others are passed over.
    ///
    /// # Errors
    /// As [`Layers::assign`].
    pub fn environment(
        &mut self,
        variables: impl IntoIterator<Item = (String, String)>,
    ) -> Result<()> {
        let mut assignments = Vec::new();
        for (variable, value) in variables {
            let Some((section, name)) =
                variable.strip_prefix("PIXMIM_").and_then(|rest| rest.split_once("__"))
            else {
                continue;
            };
            let key = format!("{section}.{name}").to_lowercase();
            assignments.push(Assignment { place: variable, key, value });
        }
        assignments.sort_by(|a, b| a.place.cmp(&b.place));
        self.assign(&assignments)
    }

    /// Lays the switches in which a method differs from others over what is there.
    ///
    /// # Errors
    /// [`Error::Config`] for an unknown name.
    pub fn method(&mut self, name: &str) -> Result<()> {
        let switches = match name {
            "pixmim" => ["low_freq", "simple", "false"],
            "mae" => ["raw", "random_resized", "true"],
            _ => return Err(Error::config("--method", not_among(name, METHODS))),
        };
        let keys = ["method.target", "method.crop", "optim.decay_tokens"];
        let assignments: Vec<_> = keys
            .iter()
            .zip(switches)
            .map(|(key, value)| Assignment {
                place: format!("--method {name}"),
                key: (*key).to_owned(),
                value: value.to_owned(),
            })
            .collect();
        self.assign(&assignments)
    }

    /// Lays values given as text over what is there, as one layer; of two for one key the last counts.
    ///
    /// # Errors
    /// [`Error::Config`] for an unknown key, a value of the wrong type or out of range, and for two
    /// values that exclude each other.
    pub fn assign(&mut self, assignments: &[Assignment]) -> Result<()> {
        let mut settings = Vec::new();
        for Assignment { place, key, value } in assignments {
            let key = Key::find(place, key)?;
            settings.push(setting(key, key.kind.read(value), place.clone())?);
        }
        self.lay(settings)
    }

    /// The text that the layers so far give for a key; none for other kinds of values.
    #[must_use]
    pub fn text(&self, key: &str) -> Option<&str> {
        self.settings.get(key)?.value.as_str()
    }

    /// The config, checked. An error names the place of the topmost value that takes part in it.
    ///
    /// # Errors
    /// [`Error::Config`] for missing keys, and for values that do not fit together.
    pub fn finish(&self) -> Result<Config> {
        let mut below = Self::new();
        below.method("pixmim")?;
        let mut settings = below.settings;
        settings.extend(self.settings.clone());
        let is_optional = |name| EITHER.iter().flatten().any(|either| *either == name);
        let mut table = Table::new();
        let mut missing = Vec::new();
        for key in KEYS {
            let (section, name) = key.split();
            let section = table.entry(section).or_insert_with(|| Value::Table(Table::new()));
            match (settings.get(key.name), section) {
                (Some(setting), Value::Table(section)) => {
                    section.insert(name.to_owned(), setting.value.clone());
                }
                _ if !is_optional(key.name) => missing.push(key.name),
                _ => {}
            }
        }
        if !missing.is_empty() {
            let why = format!("lacks {}; add them, or give --preset", missing.join(", "));
            return Err(Error::config("config", why));
        }
        let config = table.try_into::<Config>().map_err(|error| {
            Error::config("config", error.message().lines().collect::<Vec<_>>().join("; "))
        })?;
        config.check().map_err(|error| self.placed(error))?;
        Ok(config)
    }

    /// Names the place where the topmost of the values that an error speaks of was given.
    fn placed(&self, error: Error) -> Error {
        let text = error.to_string();
        let mut spoken_of = Vec::new();
        for word in text.split(|c: char| !(c.is_alphanumeric() || c == '_' || c == '.')) {
            spoken_of.extend(self.settings.get(word.trim_end_matches('.')));
        }
        match spoken_of.into_iter().max_by_key(|setting| setting.layer) {
            Some(topmost) => Error::config(&topmost.place, text),
            None => Error::config("config", text),
        }
    }

    fn lay(&mut self, settings: Vec<(&'static str, Setting)>) -> Result<()> {
        let given = |name| settings.iter().find(|(key, _)| *key == name);
        for [one, other] in EITHER {
            match (given(one), given(other)) {
                (Some((_, setting)), Some(_)) => {
                    let why = format!("gives both `{one}` and `{other}`; give one of them");
                    return Err(Error::config(&setting.place, why));
                }
                (Some(_), None) => drop(self.settings.remove(other)),
                (None, Some(_)) => drop(self.settings.remove(one)),
                (None, None) => {}
            }
        }
        for (key, setting) in settings {
            self.settings.insert(key, Setting { layer: self.count, ..setting });
        }
        self.count += 1;
        Ok(())
    }
}

impl Key {
    /// The key of that name; `place` is where the name was given.
    ///
    /// # Errors
    /// [`Error::Config`] with the nearest name if there is no such key.
    pub fn find(place: &str, name: &str) -> Result<&'static Self> {
        KEYS.iter().find(|key| key.name == name).ok_or_else(|| unknown(place, name))
    }
}

/// A value of a parsed text as a plain TOML value.
fn read(value: Spanned<DeValue<'_>>) -> Result<Value, String> {
    Value::deserialize(ValueDeserializer::from(value))
        .map_err(|error| error.message().lines().collect::<Vec<_>>().join("; "))
}

fn setting(key: &Key, value: Value, place: String) -> Result<(&'static str, Setting)> {
    let shown = key.kind.show(&value);
    match key.kind.accept(value) {
        Some(value) => Ok((key.name, Setting { value, place, layer: 0 })),
        None => {
            let why = format!("`{}` is {shown}, expected {}", key.name, key.kind);
            Err(Error::config(place, why))
        }
    }
}

fn is_section(name: &str) -> bool {
    KEYS.iter().any(|key| key.split().0 == name)
}

fn unknown(place: &str, name: &str) -> Error {
    let mut why = format!("unknown key `{name}`");
    let name = name.to_lowercase();
    let leaf = name.rsplit('.').next().unwrap_or(&name);
    // A right name in the wrong section, or in none, is the nearest of all.
    let namesake = KEYS.iter().find(|key| key.split().1 == leaf).map(|key| key.name);
    let similar = || match name.contains('.') {
        true => nearest(&name, KEYS.iter().map(|key| key.name)),
        false => nearest(&name, KEYS.iter().map(|key| key.split().0)),
    };
    match namesake.or_else(similar) {
        Some(near) => why.push_str(&format!("; did you mean `{near}`?")),
        None => why.push_str("; docs/config.md lists all keys"),
    }
    Error::config(place, why)
}

fn not_among(name: &str, names: impl IntoIterator<Item = &'static str, IntoIter: Clone>) -> String {
    let names = names.into_iter();
    let mut why = format!("`{name}` is none of {}", names.clone().collect::<Vec<_>>().join(", "));
    if let Some(near) = nearest(name, names) {
        why.push_str(&format!("; did you mean `{near}`?"));
    }
    why
}

fn nearest(name: &str, names: impl Iterator<Item = &'static str>) -> Option<&'static str> {
    names
        .map(|candidate| (strsim::jaro_winkler(name, candidate), candidate))
        .filter(|(similarity, _)| *similarity >= SIMILAR)
        .max_by(|a, b| a.0.total_cmp(&b.0))
        .map(|(_, candidate)| candidate)
}
