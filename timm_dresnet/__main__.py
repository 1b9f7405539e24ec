from timm_dresnet.cli import main

raise SystemExit(main())
