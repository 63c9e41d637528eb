//! The functions that the header declares.

/// A function that returns a status.
pub(super) struct Function {
    pub(super) name: String,
    pub(super) params: Vec<Param>,
}

pub(super) struct Param {
    /// As in the header, without the name and `struct`: `const pixmim_tensor *`.
    pub(super) kind: String,
    pub(super) name: String,
}

/// The functions of the header that return a status; the others take nothing that could be wrong, or let it pass.
pub(super) fn functions() -> Vec<Function> {
    let code = code();
    let declarations = code.split("pixmim_status pixmim_").skip(1);
    declarations.map(|rest| declaration(rest.split(';').next().unwrap())).collect()
}

/// The fields of a struct of the header: type, name, how many.
pub(super) fn fields(name: &str) -> Vec<(String, String, usize)> {
    let code = code();
    let (_, rest) = code.split_once(&format!("typedef struct {name} {{")).unwrap();
    let (body, _) = rest.split_once('}').unwrap();
    let declarations = body.split(';').map(str::trim).filter(|text| !text.is_empty());
    let field = declarations.map(|text| {
        let (kind, name) = text.rsplit_once(' ').unwrap();
        let (name, count) = name.trim_end_matches(']').split_once('[').unwrap_or((name, "1"));
        (kind.to_owned(), name.to_owned(), count.parse().unwrap())
    });
    field.collect()
}

/// The header without its comments, on one line.
fn code() -> String {
    include_str!("../../include/pixmim.h")
        .lines()
        .filter(|line| !line.trim_start().starts_with("//"))
        .flat_map(|line| [line.trim(), " "])
        .collect()
}

/// `op_forward(const struct pixmim_context *context, ..)`.
fn declaration(text: &str) -> Function {
    let (name, params) = text.split_once('(').unwrap();
    let params = params.strip_suffix(')').unwrap().split(',').map(|param| {
        let param = param.trim();
        let at = param.rfind([' ', '*']).unwrap() + 1;
        Param { kind: param[..at].trim().replace("struct ", ""), name: param[at..].into() }
    });
    Function { name: format!("pixmim_{name}"), params: params.collect() }
}

#[test]
fn a_declaration_is_read_as_c_reads_it() {
    let of = declaration("f(const struct pixmim_tensor *out, int64_t n, struct x **to)");
    let read = |param: &Param| format!("{}|{}", param.kind, param.name);
    let params: Vec<_> = of.params.iter().map(read).collect();
    assert_eq!(of.name, "pixmim_f");
    assert_eq!(params, ["const pixmim_tensor *|out", "int64_t|n", "x **|to"]);
}
