# make help lists the targets.
PYTHON = python3
PREFIX = /usr/local
prefix = $(PREFIX)
DESTDIR =
DEMO = .demo
PYZ = cstor.pyz
MAN = cstor.1

.PHONY: help demo test lab lint bench dist docs pictures install uninstall

help: ## show this list
	@sed -n 's/^\([a-z]*\): .*## /\1	/p' Makefile | expand -t 12

# Prints a heading for a step of the demo.
STEP = printf '\n== %s\n'
CSTOR = $(PYTHON) cstor.py --root $(DEMO)/store

demo: ## make a sample store and do the main jobs on it; needs Python alone
	@rm -rf $(DEMO)
	@$(STEP) 'Make a sample store: two images on three layers, and a container'
	$(PYTHON) test_cstor.py --make-store $(DEMO)/store
	@$(STEP) 'What is in it, and is it sound?'
	$(CSTOR) image list
	$(CSTOR) image layers sample
	$(CSTOR) image verify --all
	@$(STEP) 'The tar of each layer, compared with its digest by another program'
	@set -e; for digest in $$($(CSTOR) image layers sample \
	    --format json | sed -n 's/.*"diff-digest": "\(sha256:[0-9a-f]*\)".*/\1/p'); do \
	  echo "layer export $$digest"; \
	  $(CSTOR) layer export $$digest -o $(DEMO)/layer.tar; \
	  $(PYTHON) -c 'import hashlib, sys; data = open(sys.argv[1], "rb").read(); \
	    found = "sha256:" + hashlib.sha256(data).hexdigest(); \
	    sys.exit("wrong: " + found) if found != sys.argv[2] else print("  sha256 is right")' \
	    $(DEMO)/layer.tar $$digest; \
	  $(PYTHON) -m tarfile -l $(DEMO)/layer.tar; \
	done
	@$(STEP) 'Look at files, and copy some out'
	$(CSTOR) image files -l sample
	$(CSTOR) image cat sample /bin/sh /etc/os-release
	$(CSTOR) image cp sample:/srv $(DEMO)/srv
	@$(STEP) 'What do layers hide, and which bytes do they waste?'
	$(CSTOR) image blame sample --hidden
	@$(STEP) 'A root file system'
	$(CSTOR) image extract sample $(DEMO)/root
	ls -l $(DEMO)/root $(DEMO)/root/srv
	@$(STEP) 'The store stays in $(DEMO). Try:'
	@echo '$(CSTOR) image diff app:1 sample'
	@echo '$(CSTOR) container cat web /srv/version'
	@echo '$(CSTOR) help'

test: ## run all tests; those that lack something are skipped with the reason
	$(PYTHON) test_cstor.py

lab: ## install the real parts that the real tests need (Debian, as root) and the linters
	DEBIAN_FRONTEND=noninteractive apt-get update -q
	DEBIAN_FRONTEND=noninteractive apt-get install -q -y --no-install-recommends \
	    podman buildah skopeo containers-storage umoci crun uidmap fuse-overlayfs \
	    xfsprogs btrfs-progs busybox-static attr zstd xz-utils pigz util-linux \
	    e2fsprogs python3 python3-venv zsh fish mandoc containerd docker.io docker-registry
	[ -e /etc/containers/policy.json ] || { mkdir -p /etc/containers && \
	    echo '{"default":[{"type":"insecureAcceptAnything"}]}' > /etc/containers/policy.json; }
	! command -v cargo >/dev/null || { DEBIAN_FRONTEND=noninteractive apt-get install -q -y \
	    --no-install-recommends gcc libc6-dev libssl-dev pkg-config && \
	    $(PYTHON) test_cstor.py --build-peer; }
	[ -x .lab/bin/ruff ] || { python3 -m venv .lab && .lab/bin/pip install -q mypy==2.4.1 ruff==0.17.6; }

lint: ## mypy --strict and ruff, from .lab or the PATH
	PATH="$(CURDIR)/.lab/bin:$$PATH" mypy --strict cstor.py test_cstor.py
	PATH="$(CURDIR)/.lab/bin:$$PATH" ruff check --no-cache --target-version py39 --line-length 100 \
	    --select E,F,W,B,C4,ISC,PIE,PLE,RET,RUF100 cstor.py test_cstor.py

bench: ## measure against the peers (podman, root, half an hour); BENCH='--row cat --json'
	$(PYTHON) test_cstor.py --bench $(BENCH)

# zipimport reads all the code for the name of its file, and once more to run it.  main() enables the
# garbage collector.  This must parse in any Python, so that cstor.py says which ones it needs.
define START
import gc
import sys
import zipimport


class Importer(zipimport.zipimporter):
    def get_filename(self, name):
        return self.archive + "/" + name + ".py"


gc.disable()
sys.path_importer_cache[sys.path[0]] = Importer(sys.path[0])
import cstor
sys.exit(cstor.main())
endef
export START

# Byte code that names no time is not compared with the source; a Python of another version, which
# cannot use it, compiles the source.  Dates and hashes are fixed, so each run makes the same bytes.
define DIST
import os, py_compile, sys, time, zipfile
target = sys.argv[1]
moment = time.gmtime(max(315532800, int(os.environ.get("SOURCE_DATE_EPOCH") or 0)))[:6]
py_compile.compile("cstor.py", target + ".new", "cstor.py", doraise=True,
                   invalidation_mode=py_compile.PycInvalidationMode.UNCHECKED_HASH)
with open(target + ".new", "rb") as code, open("cstor.py", "rb") as source:
    files = {"__main__.py": os.environ["START"].encode(), "cstor.pyc": code.read(),
             "cstor.py": source.read()}
with open(target + ".new", "wb") as file:
    file.write(b"#!/usr/bin/env python3\n")
    with zipfile.ZipFile(file, "w") as archive:
        for name, data in files.items():
            info = zipfile.ZipInfo(name, moment)
            info.external_attr = 0o100644 << 16
            info.compress_type = zipfile.ZIP_DEFLATED if name == "cstor.py" else zipfile.ZIP_STORED
            archive.writestr(info, data)
os.chmod(target + ".new", 0o755)
os.rename(target + ".new", target)
endef
export DIST

dist: ## make cstor.pyz: one file with its byte code, which starts like an import
	PYTHONHASHSEED=0 $(PYTHON) -c "$$DIST" $(PYZ)

docs: $(MAN) ## make the man page, and run the README's examples for what they print
	$(PYTHON) test_cstor.py --make-docs

pictures: ## draw what commands print, for the README
	$(PYTHON) test_cstor.py --make-pictures

$(MAN): cstor.py test_cstor.py README.md
	$(PYTHON) test_cstor.py --make-man $@

# A list of all that was made, directories too, lets uninstall leave nothing.  A .pth file in the
# directory of Python's modules names the one of cstor.py, which is compiled once and for all.
# -S: the command imports nothing but the standard library.
define INSTALL
import compileall, contextlib, io, os, site, sys, sysconfig
import cstor
python, dest, prefix, manual = sys.argv[1:]
if not prefix.startswith("/"):
    sys.exit("prefix must be an absolute path, not " + prefix)
os.makedirs(dest or "/", exist_ok=True)
library = prefix + "/lib/cstor"
listing = dest + library + "/installed"
made = open(listing).read().splitlines() if os.path.exists(listing) else []

def add_folder(path):
    if not os.path.isdir(dest + path):
        add_folder(os.path.dirname(path))
        os.mkdir(dest + path)
        made.append(path)

def add(path, text, mode=0o644):
    add_folder(os.path.dirname(path))
    with open(dest + path, "w") as file:
        file.write(text)
    os.chmod(dest + path, mode)
    made.extend({path} - set(made))

def completion(shell):
    with contextlib.redirect_stdout(io.StringIO()) as text:
        cstor.main(["completion", shell])
    return text.getvalue()

add(library + "/cstor.py", open("cstor.py").read())
compileall.compile_dir(dest + library, quiet=1, force=True)
made.extend({library + "/__pycache__"} - set(made))
first = python + " -S" if "/" in python else "/usr/bin/env " + python
add(prefix + "/bin/cstor", f"#!{first}\nimport gc\nimport sys\ngc.disable()\n"
    f"sys.path.insert(0, {library!r})\nimport cstor\nsys.exit(cstor.main())\n", 0o755)
share = prefix + "/share/"
add(share + "man/man1/cstor.1", open(manual).read())
add(share + "bash-completion/completions/cstor", completion("bash"))
add(share + "zsh/site-functions/_cstor", completion("zsh"))
add(share + "fish/vendor_completions.d/cstor.fish", completion("fish"))
below = [path for path in site.getsitepackages() if path.startswith(prefix + "/")]
add((below or [sysconfig.get_path("purelib", "posix_prefix", {"base": prefix})])[0] + "/cstor.pth",
    library + "\n")
add(listing[len(dest):], "\n".join(made) + "\n")
print(f"{prefix}/bin/cstor is installed;", f"import cstor works in {python}" if below else
      f"{python} finds no modules below {prefix}: import cstor with PYTHONPATH={library}")
endef
export INSTALL

define UNINSTALL
import os, shutil, sys
dest, prefix = sys.argv[1:]
listing = prefix + "/lib/cstor/installed"
for path in [listing, *reversed(open(dest + listing).read().splitlines())]:
    try:
        (shutil.rmtree if path.endswith("/__pycache__") else
         os.rmdir if os.path.isdir(dest + path) else os.unlink)(dest + path)
    except OSError as error:
        print(f"left: {error}")
endef
export UNINSTALL

install: $(MAN) ## install command, man page, completions, module below $(DESTDIR)$(prefix)
	$(PYTHON) -B -c "$$INSTALL" "$(PYTHON)" "$(DESTDIR)" "$(prefix)" "$(MAN)"

uninstall: ## remove what install made
	$(PYTHON) -c "$$UNINSTALL" "$(DESTDIR)" "$(prefix)"
