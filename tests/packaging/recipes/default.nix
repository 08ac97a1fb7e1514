# The patch phase without nixpkgs: the builder is the machine's own shell.
{ assets, src, patched }:
derivation {
  name = "vllm-patched";
  system = builtins.currentSystem;
  builder = "/bin/sh";
  PATH = "/usr/bin:/bin";
  src = /. + src;
  patches = import (/. + assets + "/nix/patches.nix");
  fetched = import (/. + assets + "/nix/fetched.nix") {
    fetchurl = import <nix/fetchurl.nix>;
    baseUrl = "file://${builtins.dirOf assets}";
  };
  inherit patched;
  args = [
    "-euc"
    ''
      mkdir "$out"
      tar xzf "$src" -C "$out" --strip-components=1
      cd "$out"
      set -- $fetched
      for one in $patches; do
        cmp "$one" "$1"
        patch -p1 -F0 <"$1"
        shift
      done
      for one in $patched; do
        sha256sum "$one"
      done
    ''
  ];
}
